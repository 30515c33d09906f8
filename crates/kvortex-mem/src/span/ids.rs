//! Which pieces of a table are picked.

use std::sync::OnceLock;

/// Numbers of pieces of a table, in the order of the pages. Segments that pick the same pieces share them.
#[derive(Debug)]
pub struct Ids {
    list: Box<[u32]>,
    /// The lowest and the highest.
    extremes: Option<(u32, u32)>,
    twice: OnceLock<Option<(usize, usize)>>,
}

impl Ids {
    /// The pieces in the order of the pages.
    pub fn list(&self) -> &[u32] {
        &self.list
    }

    /// The lowest and the highest number, unless there is none.
    pub fn extremes(&self) -> Option<(u32, u32)> {
        self.extremes
    }

    /// Two pages with the same number, looked for once.
    pub(super) fn twice(&self) -> Option<(usize, usize)> {
        *self.twice.get_or_init(|| {
            let mut sorted = self.list.to_vec();
            sorted.sort_unstable();
            let twice = sorted.windows(2).find(|pair| pair[0] == pair[1])?[0];
            let mut pages = self.list.iter().enumerate().filter(|&(_, &id)| id == twice).map(|(page, _)| page);
            pages.next().zip(pages.next())
        })
    }
}

impl From<Vec<u32>> for Ids {
    fn from(list: Vec<u32>) -> Ids {
        let extremes = list.iter().min().copied().zip(list.iter().max().copied());
        Ids { list: list.into(), extremes, twice: OnceLock::new() }
    }
}
