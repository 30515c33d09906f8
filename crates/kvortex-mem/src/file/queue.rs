//! Operations that have not begun, reads before writes.

use std::collections::VecDeque;

use super::op::{Access, Op};

/// What waits. Writes under way never take all of the depth, so that a read that comes finds room.
pub(super) struct Queue {
    reads: VecDeque<Op>,
    writes: VecDeque<Op>,
    running: usize,
    running_writes: usize,
    most_writes: usize,
    closed: bool,
}

impl Queue {
    pub(super) fn new(depth: usize) -> Queue {
        Queue {
            reads: VecDeque::new(),
            writes: VecDeque::new(),
            running: 0,
            running_writes: 0,
            most_writes: (depth - depth / 4).max(1),
            closed: false,
        }
    }

    /// Takes `ops` in, or hands them back when closed.
    pub(super) fn push(&mut self, ops: Vec<Op>) -> Vec<Op> {
        if self.closed {
            return ops;
        }
        for op in ops {
            match op.access {
                Access::Read => self.reads.push_back(op),
                Access::Write => self.writes.push_back(op),
            }
        }
        Vec::new()
    }

    /// The next to begin.
    pub(super) fn pop(&mut self) -> Option<Op> {
        let op = match self.reads.pop_front() {
            Some(op) => op,
            None if self.running_writes < self.most_writes => {
                let op = self.writes.pop_front()?;
                self.running_writes += 1;
                op
            }
            None => return None,
        };
        self.running += 1;
        Some(op)
    }

    /// What has not begun and must not any more.
    pub(super) fn expired(&mut self) -> Vec<Op> {
        let late = |ops: &mut VecDeque<Op>| {
            let count = ops.iter().take_while(|op| op.is_late()).count();
            ops.drain(..count).collect::<Vec<_>>()
        };
        late(&mut self.reads)
    }

    /// One that had begun has ended.
    pub(super) fn ended(&mut self, access: Access) {
        self.running -= 1;
        self.running_writes -= usize::from(access == Access::Write);
    }

    /// Takes nothing more; what has not begun comes back.
    pub(super) fn close(&mut self) -> Vec<Op> {
        self.closed = true;
        self.reads.drain(..).chain(self.writes.drain(..)).collect()
    }

    pub(super) fn is_closed(&self) -> bool {
        self.closed
    }

    /// Nothing waits and nothing is under way.
    pub(super) fn is_idle(&self) -> bool {
        self.running == 0 && self.reads.is_empty() && self.writes.is_empty()
    }
}
