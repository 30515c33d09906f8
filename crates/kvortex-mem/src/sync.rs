//! Locks, atomics and threads: those of `parking_lot` and `std`, or those of `shuttle` under `cfg(shuttle)`.
//!
//! The names and shapes are the same in both worlds, so code written against this module can be model-checked unchanged.
//! Under shuttle timed waits never time out.

pub use std::sync::{Arc, Weak};

#[cfg(not(shuttle))]
pub use parking_lot::{Condvar, Mutex, MutexGuard, WaitTimeoutResult};
#[cfg(not(shuttle))]
pub use std::{sync::atomic, thread};

#[cfg(shuttle)]
pub use self::modelled::{Condvar, Mutex, MutexGuard, WaitTimeoutResult};
#[cfg(shuttle)]
pub use shuttle::{sync::atomic, thread};

/// A place where the model may switch threads. Copying bytes is none of itself, and real threads need none.
pub(crate) fn switch_point() {
    #[cfg(shuttle)]
    thread::yield_now();
}

#[cfg(shuttle)]
mod modelled {
    //! `parking_lot`'s shapes over shuttle's locks.

    use shuttle::sync as model;
    use std::ops::{Deref, DerefMut};
    use std::time::{Duration, Instant};

    /// A lock whose guard is returned directly.
    #[derive(Debug, Default)]
    pub struct Mutex<T>(model::Mutex<T>);

    /// Access to the value of a locked [`Mutex`].
    pub struct MutexGuard<'a, T>(Option<model::MutexGuard<'a, T>>);

    const HELD: &str = "the guard is empty only while its condition variable waits";

    impl<T> Mutex<T> {
        /// A new unlocked lock.
        pub const fn new(value: T) -> Mutex<T> {
            Mutex(model::Mutex::new(value))
        }

        /// Waits for the lock.
        pub fn lock(&self) -> MutexGuard<'_, T> {
            MutexGuard(Some(self.0.lock().unwrap_or_else(|poison| poison.into_inner())))
        }

        /// The lock if it is free now.
        pub fn try_lock(&self) -> Option<MutexGuard<'_, T>> {
            self.0.try_lock().ok().map(|guard| MutexGuard(Some(guard)))
        }

        /// The value, without locking: the exclusive borrow proves that nobody holds it.
        pub fn get_mut(&mut self) -> &mut T {
            self.0.get_mut().unwrap_or_else(|poison| poison.into_inner())
        }

        /// The value.
        pub fn into_inner(self) -> T {
            self.0.into_inner().unwrap_or_else(|poison| poison.into_inner())
        }
    }

    impl<T> Deref for MutexGuard<'_, T> {
        type Target = T;

        fn deref(&self) -> &T {
            self.0.as_ref().expect(HELD)
        }
    }

    impl<T> DerefMut for MutexGuard<'_, T> {
        fn deref_mut(&mut self) -> &mut T {
            self.0.as_mut().expect(HELD)
        }
    }

    /// A condition variable over [`Mutex`].
    #[derive(Debug, Default)]
    pub struct Condvar(model::Condvar);

    /// Whether a timed wait ended by its timeout.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub struct WaitTimeoutResult(bool);

    impl WaitTimeoutResult {
        /// True if the wait ended by its timeout.
        pub fn timed_out(&self) -> bool {
            self.0
        }
    }

    impl Condvar {
        /// A condition variable with no waiters.
        pub const fn new() -> Condvar {
            Condvar(model::Condvar::new())
        }

        /// Releases the lock, waits for a notification and locks again.
        pub fn wait<T>(&self, guard: &mut MutexGuard<'_, T>) {
            let held = guard.0.take().expect(HELD);
            guard.0 = Some(self.0.wait(held).unwrap_or_else(|poison| poison.into_inner()));
        }

        /// As [`Condvar::wait`]; the model has no clock, so it never times out.
        pub fn wait_for<T>(&self, guard: &mut MutexGuard<'_, T>, _timeout: Duration) -> WaitTimeoutResult {
            self.wait(guard);
            WaitTimeoutResult(false)
        }

        /// As [`Condvar::wait`]; the model has no clock, so it never times out.
        pub fn wait_until<T>(&self, guard: &mut MutexGuard<'_, T>, _deadline: Instant) -> WaitTimeoutResult {
            self.wait(guard);
            WaitTimeoutResult(false)
        }

        /// Wakes one waiter.
        pub fn notify_one(&self) {
            self.0.notify_one();
        }

        /// Wakes all waiters.
        pub fn notify_all(&self) {
            self.0.notify_all();
        }
    }
}
