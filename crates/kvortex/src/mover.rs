//! Makes the copies of a plan, and never decides which.

use kvortex_mem::copy::{CopyEngine, Direction, Done, Transfer};
use kvortex_mem::error::MemError;
use kvortex_mem::span::Pages;

use crate::plan::{Kind, Plan};
use crate::sync::Arc;
use crate::tier::host::Host;

/// Binds a copy engine to the host tier.
pub struct Mover {
    host: Host,
    copies: Arc<dyn CopyEngine>,
}

impl Mover {
    /// Moves between `host` and pages with `copies`.
    #[must_use]
    pub fn new(host: Host, copies: Arc<dyn CopyEngine>) -> Self {
        Self { host, copies }
    }

    /// The host tier.
    #[must_use]
    pub const fn host(&self) -> &Host {
        &self.host
    }

    /// Makes the copies of `plan` and returns when every byte is in place.
    ///
    /// # Errors
    /// What the copy engine says; some pages may then be written and others not.
    pub fn run(&self, plan: &Plan, pages: Pages) -> Result<(), MemError> {
        if plan.steps.is_empty() {
            return Ok(());
        }
        self.copies.run(self.transfer(plan, pages)?)
    }

    /// Starts the copies of `plan`. `done` is called once, from any thread, when nothing refers to the pages any more.
    ///
    /// # Errors
    /// When the plan cannot be started; `done` is then dropped without a call.
    pub fn submit(&self, plan: &Plan, pages: Pages, done: Done) -> Result<(), MemError> {
        if plan.steps.is_empty() {
            drop(pages);
            done(Ok(()));
            return Ok(());
        }
        self.copies.submit(self.transfer(plan, pages)?, done)
    }

    fn transfer(&self, plan: &Plan, pages: Pages) -> Result<Transfer, MemError> {
        let direction = match plan.kind {
            Kind::Save => Direction::Store,
            Kind::Load => Direction::Load,
        };
        Transfer::new(direction, Arc::clone(self.host.arena()), plan.steps.clone(), pages)
    }
}
