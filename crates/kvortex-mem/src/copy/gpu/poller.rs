//! The thread that sees copies end. It calls the device for nothing but to ask, and never takes a lock of Python's.

use std::time::Duration;

use super::Inner;
use super::control::Control;
use crate::error::MemError;
use crate::sync::{Arc, thread};

/// Between two looks at the device: soon after something has landed, then ever more seldom, since each look takes locks of the
/// driver that others need to start their kernels.
const FIRST_REST: Duration = Duration::from_micros(20);
const LONGEST_REST: Duration = Duration::from_micros(200);

/// Starts the poller unless it runs. Without it nothing would end.
pub(super) fn ensure(inner: &Arc<Inner>, control: &mut Control) -> Result<(), MemError> {
    if control.poller.is_none() {
        let own = Arc::clone(inner);
        let builder = thread::Builder::new().name("kvortex-gpu".to_owned());
        control.poller = Some(builder.spawn(move || watch(&own)).map_err(MemError::Thread)?);
    }
    Ok(())
}

/// Lets everything land, and waits for that except on the poller itself.
pub(super) fn close(inner: &Arc<Inner>) {
    let poller = {
        let mut control = inner.control.lock();
        (control.stopped, control.closing) = (true, true);
        control.poller.take()
    };
    inner.work.notify_all();
    if let Some(poller) = poller
        && poller.thread().id() != thread::current().id()
        && poller.join().is_err()
    {
        log::error!("the thread that watches GPU copies ended by a panic");
    }
}

fn watch(inner: &Arc<Inner>) {
    shorten_rests();
    let mut rest = FIRST_REST;
    loop {
        let mut control = inner.control.lock();
        while !control.is_busy() {
            if control.closing {
                return;
            }
            inner.work.wait(&mut control);
            rest = FIRST_REST;
        }
        control.poll();
        let landed = control.take_landed();
        drop(control);
        if landed.is_empty() {
            std::thread::sleep(rest);
            rest = (rest * 2).min(LONGEST_REST);
        } else {
            rest = FIRST_REST;
        }
        inner.report(landed);
    }
}

/// The system otherwise adds 50 µs to each rest.
fn shorten_rests() {
    #[cfg(target_os = "linux")]
    // SAFETY: sets the timer slack of this thread to 1 µs; no memory is involved.
    unsafe {
        libc::prctl(libc::PR_SET_TIMERSLACK, 1000 as libc::c_ulong)
    };
}
