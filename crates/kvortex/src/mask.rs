//! One bit per key.

/// Answers for a list of keys, bit `i` for key `i`. Used only where the keys are any set; a prefix is a length.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BlockMask {
    bits: Vec<u8>,
    len: usize,
}

impl BlockMask {
    /// `len` zeros.
    #[must_use]
    pub fn new(len: usize) -> Self {
        Self { bits: vec![0; len.div_ceil(8)], len }
    }

    /// Sets bit `i`.
    ///
    /// # Panics
    /// When `i` is out of range.
    pub fn set(&mut self, i: usize) {
        assert!(i < self.len, "bit {i} of a mask of {}", self.len);
        self.bits[i / 8] |= 1 << (i % 8);
    }

    /// Bit `i`; false beyond the end.
    #[must_use]
    pub fn get(&self, i: usize) -> bool {
        self.bits.get(i / 8).is_some_and(|byte| byte >> (i % 8) & 1 == 1)
    }

    /// Sets every bit that `other`, a mask of the same length, has.
    pub(crate) fn include(&mut self, other: &Self) {
        self.bits.iter_mut().zip(&other.bits).for_each(|(mine, theirs)| *mine |= theirs);
    }

    /// Number of bits.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.len
    }

    /// Whether there is no bit.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Number of ones.
    #[must_use]
    pub fn count(&self) -> usize {
        self.bits.iter().map(|byte| byte.count_ones() as usize).sum()
    }

    /// Number of ones before the first zero.
    #[must_use]
    pub fn prefix(&self) -> usize {
        let full = self.bits.iter().take_while(|&&byte| byte == 0xFF).count();
        let rest = self.bits.get(full).map_or(0, |byte| byte.trailing_ones() as usize);
        full * 8 + rest
    }

    /// Whether every bit is one; true for no bits.
    #[must_use]
    pub fn all(&self) -> bool {
        self.prefix() == self.len
    }

    /// Whether some bit is one.
    #[must_use]
    pub fn any(&self) -> bool {
        self.bits.iter().any(|&byte| byte != 0)
    }

    /// The bits, bit `i` at `i % 8` of byte `i / 8`; unused bits are zero.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        &self.bits
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn agrees_with_a_list_of_booleans() {
        for len in [0, 1, 7, 8, 9, 16, 100] {
            for seed in 0_usize..50 {
                let want: Vec<bool> = (0..len).map(|i| (i * 7 + seed * 13) % 11 != seed % 11).collect();
                let mut mask = BlockMask::new(len);
                (0..len).filter(|&i| want[i]).for_each(|i| mask.set(i));
                assert!((0..len + 9).all(|i| mask.get(i) == want.get(i).copied().unwrap_or(false)));
                assert_eq!(mask.count(), want.iter().filter(|&&b| b).count());
                assert_eq!(mask.prefix(), want.iter().take_while(|&&b| b).count());
                assert_eq!(mask.all(), want.iter().all(|&b| b));
                assert_eq!(mask.any(), want.iter().any(|&b| b));
            }
        }
    }
}
