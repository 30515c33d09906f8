//! The contract of a device, call by call.

use std::ptr::NonNull;

use super::ranges::Kind;
use super::{Event, Op, Pool, Sim, State, Stream};
use crate::device::{CopyRows, Device, DeviceInfo, Launch, PoolNumbers, Priority, RawEvent, RawPool, RawStream};
use crate::error::MemError;
use crate::sync::MutexGuard;

impl State {
    fn number(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    /// Takes `bytes` of the device's memory.
    fn take(&mut self, bytes: usize, kind: Kind, total: usize) -> Result<NonNull<u8>, MemError> {
        let free = self.memory_left;
        self.memory_left =
            free.checked_sub(bytes).ok_or(MemError::OutOfDeviceMemory { requested: bytes, free, total })?;
        NonNull::new(self.ranges.allocate(bytes, kind) as *mut u8).ok_or(MemError::ZeroBytes { what: "memory" })
    }

    /// Gives device memory back.
    pub(super) fn give_back(&mut self, addr: usize) {
        match self.ranges.remove(addr) {
            Some((Kind::Allocated, bytes)) => self.memory_left += bytes,
            Some((Kind::Pooled(pool), bytes)) => {
                self.memory_left += bytes;
                if let Some(pool) = self.pools.get_mut(&pool) {
                    pool.used -= bytes;
                    pool.reserved = pool.reserved.min(pool.keep.max(pool.used));
                }
            }
            _ => self.violate(format!("{addr:#x} was given back and is no device memory")),
        }
    }
}

impl Sim {
    /// The state, unless the device is lost or `call` is to fail.
    fn enter(&self, call: &'static str) -> Result<MutexGuard<'_, State>, MemError> {
        self.check_process()?;
        let mut state = self.shared.state.lock();
        if let Some(cause) = &state.lost {
            return Err(MemError::DeviceLost { cause: cause.clone() });
        }
        if let Some(left) = state.failures.get_mut(call).filter(|left| **left > 0) {
            *left -= 1;
            return Err(MemError::Device { call, name: "SIMULATED".to_owned(), code: 999, remedy: String::new() });
        }
        Ok(state)
    }

    fn check_process(&self) -> Result<(), MemError> {
        let child = std::process::id();
        if child == self.pid { Ok(()) } else { Err(MemError::Forked { parent: self.pid, child }) }
    }

    fn push(&self, call: &'static str, stream: RawStream, op: Op) -> Result<(), MemError> {
        let mut state = self.enter(call)?;
        state.streams.entry(stream.0).or_default().queue.push_back(op);
        drop(state);
        self.shared.work.notify_all();
        Ok(())
    }
}

impl Device for Sim {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn check(&self) -> Result<(), MemError> {
        self.enter("check").map(drop)
    }

    fn create_stream(&self, _: Priority) -> Result<RawStream, MemError> {
        let mut state = self.enter("create_stream")?;
        let id = state.number();
        state.streams.insert(id, Stream::default());
        Ok(RawStream(id))
    }

    /// What it was given goes on; an empty queue left behind costs nothing.
    fn destroy_stream(&self, _: RawStream) {}

    fn create_event(&self, _timed: bool) -> Result<RawEvent, MemError> {
        let mut state = self.enter("create_event")?;
        let id = state.number();
        state.events.insert(id, Event::default());
        Ok(RawEvent(id))
    }

    fn destroy_event(&self, event: RawEvent) {
        if self.check_process().is_err() {
            return;
        }
        let mut state = self.shared.state.lock();
        if let Some(found) = state.events.get_mut(&event.0) {
            found.destroyed = true;
            if found.waiters == 0 {
                state.events.remove(&event.0);
            }
        }
    }

    fn record(&self, event: RawEvent, stream: RawStream) -> Result<(), MemError> {
        let mut state = self.enter("record")?;
        let found = state.events.entry(event.0).or_default();
        found.recorded += 1;
        let op = Op::Record { event: event.0, number: found.recorded };
        state.streams.entry(stream.0).or_default().queue.push_back(op);
        drop(state);
        self.shared.work.notify_all();
        Ok(())
    }

    fn wait(&self, stream: RawStream, event: RawEvent) -> Result<(), MemError> {
        let mut state = self.enter("wait")?;
        let found = state.events.entry(event.0).or_default();
        found.waiters += 1;
        let op = Op::Wait { event: event.0, number: found.recorded };
        state.streams.entry(stream.0).or_default().queue.push_back(op);
        drop(state);
        self.shared.work.notify_all();
        Ok(())
    }

    fn is_passed(&self, event: RawEvent) -> Result<bool, MemError> {
        let state = self.enter("is_passed")?;
        Ok(state.events.get(&event.0).is_none_or(|event| event.passed >= event.recorded))
    }

    fn synchronize(&self, event: RawEvent) -> Result<(), MemError> {
        let mut state = self.enter("synchronize")?;
        let wanted = state.events.get(&event.0).map_or(0, |event| event.recorded);
        while state.events.get(&event.0).is_some_and(|event| event.passed < wanted) {
            if let Some(cause) = &state.lost {
                return Err(MemError::DeviceLost { cause: cause.clone() });
            }
            self.shared.done.wait(&mut state);
        }
        Ok(())
    }

    fn elapsed_ms(&self, start: RawEvent, end: RawEvent) -> Result<f64, MemError> {
        let state = self.enter("elapsed_ms")?;
        let when = |event: RawEvent| state.events.get(&event.0).and_then(|event| event.when);
        let never = MemError::OutOfRange { what: "event", index: 0, count: 0 };
        let (start, end) = when(start).zip(when(end)).ok_or(never)?;
        Ok(end.saturating_duration_since(start).as_secs_f64() * 1e3)
    }

    unsafe fn copy(&self, stream: RawStream, to: usize, from: usize, bytes: usize) -> Result<(), MemError> {
        self.push("copy", stream, Op::Copy { to, from, bytes, done: 0 })
    }

    unsafe fn copy_rows(&self, stream: RawStream, copy: &CopyRows) -> Result<(), MemError> {
        self.push("copy_rows", stream, Op::CopyRows { copy: *copy, next: 0 })
    }

    unsafe fn launch(&self, stream: RawStream, launch: &Launch) -> Result<(), MemError> {
        if launch.row_count == 0 || launch.item_count == 0 {
            return self.enter("launch").map(drop);
        }
        self.push("launch", stream, Op::Launch { launch: *launch, next: 0 })
    }

    fn allocate(&self, bytes: usize) -> Result<NonNull<u8>, MemError> {
        self.enter("allocate")?.take(bytes, Kind::Allocated, self.info.memory_bytes)
    }

    unsafe fn free(&self, addr: NonNull<u8>) {
        if self.check_process().is_ok() {
            self.idle();
            self.shared.state.lock().give_back(addr.as_ptr() as usize);
        }
    }

    unsafe fn register(&self, addr: NonNull<u8>, bytes: usize) -> Result<(), MemError> {
        let registered = self.enter("register")?.ranges.register(addr.as_ptr() as usize, bytes);
        let (name, remedy) = ("ALREADY_REGISTERED".to_owned(), String::new());
        if registered { Ok(()) } else { Err(MemError::Device { call: "register", name, code: 712, remedy }) }
    }

    unsafe fn unregister(&self, addr: NonNull<u8>) -> Result<(), MemError> {
        self.check_process()?;
        let mut state = self.shared.state.lock();
        match state.ranges.remove(addr.as_ptr() as usize) {
            Some((Kind::Registered, _)) => Ok(()),
            _ => {
                let (name, remedy) = ("NOT_REGISTERED".to_owned(), String::new());
                state.violate(format!("{addr:?} is not registered"));
                Err(MemError::Device { call: "unregister", name, code: 713, remedy })
            }
        }
    }

    fn create_pool(&self, keep_bytes: usize) -> Result<RawPool, MemError> {
        let mut state = self.enter("create_pool")?;
        let id = state.number();
        state.pools.insert(id, Pool { keep: keep_bytes, ..Pool::default() });
        Ok(RawPool(id))
    }

    fn destroy_pool(&self, pool: RawPool) {
        if self.check_process().is_ok() {
            self.shared.state.lock().pools.remove(&pool.0);
        }
    }

    fn pool_allocate(&self, pool: RawPool, bytes: usize, _: RawStream) -> Result<NonNull<u8>, MemError> {
        let mut state = self.enter("pool_allocate")?;
        let addr = state.take(bytes, Kind::Pooled(pool.0), self.info.memory_bytes)?;
        if let Some(pool) = state.pools.get_mut(&pool.0) {
            pool.used += bytes;
            pool.peak = pool.peak.max(pool.used);
            pool.reserved = pool.reserved.max(pool.used);
        }
        Ok(addr)
    }

    unsafe fn pool_free(&self, addr: NonNull<u8>, stream: RawStream) -> Result<(), MemError> {
        self.push("pool_free", stream, Op::Free { addr: addr.as_ptr() as usize })
    }

    fn pool_numbers(&self, pool: RawPool) -> Result<PoolNumbers, MemError> {
        let state = self.enter("pool_numbers")?;
        let none = MemError::OutOfRange { what: "pool", index: pool.0 as usize, count: state.pools.len() };
        let pool = state.pools.get(&pool.0).ok_or(none)?;
        Ok(PoolNumbers { reserved_bytes: pool.reserved, used_bytes: pool.used, peak_used_bytes: pool.peak })
    }

    fn pool_trim(&self, pool: RawPool, keep_bytes: usize) -> Result<(), MemError> {
        let mut state = self.enter("pool_trim")?;
        if let Some(pool) = state.pools.get_mut(&pool.0) {
            pool.reserved = pool.reserved.min(keep_bytes.max(pool.used));
        }
        Ok(())
    }

    fn memory(&self) -> Result<(usize, usize), MemError> {
        Ok((self.enter("memory")?.memory_left, self.info.memory_bytes))
    }
}
