//! What every [`Device`] must do, as one suite. A violation panics with what was violated.

use std::ptr::NonNull;

use crate::device::{CopyRows, Device, DeviceMemory, Event, Item, Launch, Priority, Row, Stream};
use crate::error::MemError;
use crate::map::{HostMemory, MapOptions};
use crate::sync::Arc;

const MIB: usize = 1 << 20;

/// Panics unless `device` keeps its contract, as far as one process can tell without losing it. Takes some seconds.
pub fn device_conforms(device: &Arc<dyn Device>) {
    let bench = Bench::new(device);
    bench.an_event_that_was_never_recorded_has_passed();
    bench.streams_keep_their_order();
    bench.an_event_orders_two_streams();
    bench.a_wait_is_for_what_was_recorded_before_it();
    bench.a_destroyed_event_is_still_waited_for();
    bench.rows_are_copied_and_nothing_between_them();
    bench.the_kernel_copies_every_item_of_every_row();
    bench.time_passes_between_timed_events();
    bench.memory_that_is_not_there_is_refused();
    bench.memory_is_registered_once();
    bench.pools_give_and_take();
    device.check().expect("a device that is still there");
}

/// Two streams, a large piece of device memory and pinned memory of twice its size.
struct Bench<'a> {
    device: &'a Arc<dyn Device>,
    first: Stream,
    second: Stream,
    there: DeviceMemory,
    host: HostMemory,
}

/// Long enough that a stream without order would overtake it.
const LEN: usize = 16 * MIB;

impl<'a> Bench<'a> {
    fn new(device: &'a Arc<dyn Device>) -> Bench<'a> {
        let stream = |priority| Stream::new(device, priority).expect("a stream");
        let (first, second) = (stream(Priority::Low), stream(Priority::High));
        let there = DeviceMemory::new(device, LEN).expect("device memory");
        Bench { device, first, second, there, host: pinned(device, 3 * LEN) }
    }

    fn part(&self, index: usize) -> NonNull<u8> {
        assert!(index < 3);
        // SAFETY: there are three.
        unsafe { self.host.addr().add(index * LEN) }
    }

    fn fill(&self, index: usize, byte: u8) {
        // SAFETY: a part of the pinned memory that no stream is using.
        unsafe { self.part(index).as_ptr().write_bytes(byte, LEN) };
    }

    fn holds(&self, index: usize, byte: u8) -> bool {
        // SAFETY: as above.
        unsafe { std::slice::from_raw_parts(self.part(index).as_ptr(), LEN) }.iter().all(|&other| other == byte)
    }

    /// `part` to the device, or the device to `part`.
    fn copy(&self, stream: &Stream, part: usize, to_device: bool) {
        let (there, here) = (self.there.addr().as_ptr() as usize, self.part(part).as_ptr() as usize);
        let (to, from) = if to_device { (there, here) } else { (here, there) };
        // SAFETY: both sides have `LEN` bytes and live as long as the bench, which settles its streams.
        unsafe { self.device.copy(stream.raw(), to, from, LEN) }.expect("a copy");
    }

    fn event(&self) -> Event {
        Event::new(self.device).expect("an event")
    }

    fn mark(&self, stream: &Stream) -> Event {
        let event = self.event();
        event.record(stream.raw()).expect("a record");
        event
    }

    fn settle(&self) {
        for stream in [&self.first, &self.second] {
            let event = self.mark(stream);
            event.synchronize().expect("an end");
            assert!(event.is_passed().expect("an answer"), "an event was waited for and has not passed");
        }
    }

    fn an_event_that_was_never_recorded_has_passed(&self) {
        let event = self.event();
        assert!(event.is_passed().expect("an answer"));
        event.hold(self.first.raw()).expect("a wait for nothing");
        event.synchronize().expect("nothing to wait for");
        self.settle();
    }

    fn streams_keep_their_order(&self) {
        for round in 0..20 {
            self.fill(0, round + 1);
            self.fill(1, 0xEE);
            self.copy(&self.first, 0, true);
            self.copy(&self.first, 2, false);
            self.copy(&self.first, 1, true);
            self.settle();
            assert!(self.holds(2, round + 1), "work of one stream was done in another order");
        }
    }

    fn an_event_orders_two_streams(&self) {
        for round in 0..20 {
            self.fill(0, round + 1);
            self.copy(&self.first, 0, true);
            self.mark(&self.first).hold(self.second.raw()).expect("a wait");
            self.copy(&self.second, 2, false);
            self.settle();
            assert!(self.holds(2, round + 1), "a stream did not wait for an event");
        }
    }

    fn a_wait_is_for_what_was_recorded_before_it(&self) {
        self.fill(0, 1);
        self.fill(1, 2);
        for _ in 0..20 {
            self.copy(&self.first, 0, true);
            let event = self.mark(&self.first);
            event.hold(self.second.raw()).expect("a wait");
            // Waits for the second stream, so a wait for this record could never end.
            self.copy(&self.second, 2, false);
            self.mark(&self.second).hold(self.first.raw()).expect("a wait");
            event.record(self.first.raw()).expect("a second record");
            self.copy(&self.first, 1, true);
            self.settle();
            assert!(self.holds(2, 1), "a wait was for another record");
        }
    }

    fn a_destroyed_event_is_still_waited_for(&self) {
        for round in 0..20 {
            self.fill(0, round + 7);
            self.copy(&self.first, 0, true);
            let event = self.mark(&self.first);
            event.hold(self.second.raw()).expect("a wait");
            drop(event);
            self.copy(&self.second, 2, false);
            self.settle();
            assert!(self.holds(2, round + 7), "the wait ended with its event");
        }
    }

    fn rows_are_copied_and_nothing_between_them(&self) {
        const ROWS: usize = 200;
        let (bytes, far, near) = (3001, 20_000, 4096);
        let (there, here) = (self.there.addr().as_ptr() as usize, self.part(2).as_ptr() as usize);
        // SAFETY: parts of the pinned memory that no stream is using.
        let pattern = unsafe { std::slice::from_raw_parts_mut(self.part(0).as_ptr(), LEN) };
        pattern.iter_mut().enumerate().for_each(|(at, byte)| *byte = (at * 31 + at / 251) as u8);
        self.fill(1, 0xA5);
        self.fill(2, 0xA5);
        self.copy(&self.first, 1, true);
        let from = self.part(0).as_ptr() as usize;
        let up = CopyRows { to: there, to_pitch: near, from, from_pitch: far, bytes, rows: ROWS };
        let down = CopyRows { to: here, to_pitch: far, from: there, from_pitch: near, bytes: near, rows: ROWS };
        // SAFETY: all rows lie in bounds of both sides, which live until the stream has passed.
        unsafe {
            self.device.copy_rows(self.first.raw(), &up).expect("a copy of rows to the device");
            self.device.copy_rows(self.first.raw(), &down).expect("a copy of rows from the device");
        }
        self.settle();
        let mut expected = vec![0xA5; LEN];
        (0..ROWS)
            .map(|row| row * far)
            .for_each(|at| expected[at..at + bytes].copy_from_slice(&pattern[at..at + bytes]));
        // SAFETY: as above.
        let seen = unsafe { std::slice::from_raw_parts(self.part(2).as_ptr(), LEN) };
        assert!(seen == expected, "rows hold other bytes");
    }

    fn the_kernel_copies_every_item_of_every_row(&self) {
        if !self.device.info().maps_host {
            return;
        }
        let (here, there) = (self.part(0).as_ptr() as u64, self.there.addr().as_ptr() as u64);
        // 100 rows of 3 items, which lie 4 KiB apart in the pages and follow each other in the slots.
        let rows: Vec<Row> = (0..100).map(|i| Row { page: there + i * 12_288, slot: here + (99 - i) * 3000 }).collect();
        let items: Vec<Item> =
            (0..3).map(|i| Item { page: i * 4096, slot: i * 1000, bytes: if i == 2 { 999 } else { 1000 } }).collect();
        let bytes: Vec<u8> = (0..LEN).map(|at| (at * 31 + at / 251) as u8).collect();
        let tables = self.part(1).as_ptr();
        // SAFETY: parts of the pinned memory that no stream is using, and tables that fit them.
        unsafe {
            self.part(2).as_ptr().copy_from_nonoverlapping(bytes.as_ptr(), LEN);
            tables.cast::<Row>().copy_from_nonoverlapping(rows.as_ptr(), rows.len());
            tables.add(4096).cast::<Item>().copy_from_nonoverlapping(items.as_ptr(), items.len());
        }
        self.fill(0, 0xA5);
        self.copy(&self.first, 2, true);
        let (rows, items) = ((tables as usize, rows.len()), (tables as usize + 4096, items.len()));
        let launch =
            Launch { rows: rows.0, row_count: rows.1, items: items.0, item_count: items.1, to_slots: true, blocks: 4 };
        // SAFETY: the tables name bytes in bounds of both sides.
        unsafe { self.device.launch(self.first.raw(), &launch) }.expect("a launch");
        self.settle();
        let mut expected = vec![0xA5; LEN];
        for (row, item) in (0..100).flat_map(|row| (0..3).map(move |item| (row, item))) {
            let (from, to) = (row * 12_288 + item * 4096, (99 - row) * 3000 + item * 1000);
            let len = if item == 2 { 999 } else { 1000 };
            expected[to..to + len].copy_from_slice(&bytes[from..from + len]);
        }
        // SAFETY: as above.
        let seen = unsafe { std::slice::from_raw_parts(self.part(0).as_ptr(), LEN) };
        assert!(seen == expected, "the kernel copied other bytes");
    }

    fn time_passes_between_timed_events(&self) {
        let event = || Event::timed(self.device).expect("a timed event");
        let (start, end) = (event(), event());
        start.record(self.first.raw()).expect("a record");
        self.copy(&self.first, 0, true);
        end.record(self.first.raw()).expect("a record");
        end.synchronize().expect("an end");
        let ms = self.device.elapsed_ms(start.raw(), end.raw()).expect("a time");
        assert!(ms > 0.0 && ms < 60_000.0, "{ms} ms");
    }

    fn memory_that_is_not_there_is_refused(&self) {
        let (free, total) = self.device.memory().expect("numbers");
        assert!(0 < free && free <= total);
        match DeviceMemory::new(self.device, 1 << 45) {
            Err(MemError::OutOfDeviceMemory { requested, total: told, .. }) => {
                assert_eq!((requested, told), (1 << 45, total));
            }
            other => panic!("32 TiB: {other:?}"),
        }
    }

    fn memory_is_registered_once(&self) {
        // SAFETY: the mapping lives as long as the bench.
        let again = unsafe { self.device.register(self.host.addr(), self.host.len()) };
        assert!(matches!(again, Err(MemError::Device { code: 712, .. })), "{again:?}");
    }

    fn pools_give_and_take(&self) {
        let pool = self.device.create_pool(64 * MIB).expect("a pool");
        let numbers = || self.device.pool_numbers(pool).expect("numbers");
        let addr = self.device.pool_allocate(pool, 32 * MIB, self.first.raw()).expect("pool memory");
        assert_eq!(numbers().used_bytes, 32 * MIB);
        // SAFETY: in bounds of both sides, which live until the stream has passed.
        unsafe {
            let (there, here) = (addr.as_ptr() as usize, self.part(0).as_ptr() as usize);
            self.device.copy(self.first.raw(), there, here, LEN).expect("a copy into pool memory");
            self.device.pool_free(addr, self.first.raw()).expect("taken back");
        }
        self.settle();
        let kept = numbers();
        assert_eq!((kept.used_bytes, kept.reserved_bytes, kept.peak_used_bytes), (0, 32 * MIB, 32 * MIB));
        self.device.pool_trim(pool, 0).expect("a trim");
        assert_eq!(numbers().reserved_bytes, 0);
        self.device.destroy_pool(pool);
    }
}

fn pinned(device: &Arc<dyn Device>, bytes: usize) -> HostMemory {
    let options = MapOptions { bytes, huge_pages: true, numa_node: None, touch_threads: 2 };
    let mut memory = HostMemory::map(&options).expect("host memory");
    memory.pin(device).expect("pinned memory");
    memory
}
