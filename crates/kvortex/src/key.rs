//! What names a block: 32 bytes that stand for its tokens and all tokens before them.

use sha2::{Digest, Sha256, block_api::compress256};

use crate::error::Error;
use crate::namespace::Namespace;

/// Bytes of a [`BlockKey`].
pub const KEY_BYTES: usize = 32;

/// Most tokens that one prompt may have: 2^24.
pub const MAX_TOKENS: usize = 1 << 24;

/// Most tokens that one block may have.
pub const MAX_BLOCK_TOKENS: usize = 1 << 16;

/// The identity of one block: a chained SHA-256 of ours ([`KeyChain`]), or an engine's own 32-byte block hash as it is.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BlockKey([u8; KEY_BYTES]);

impl BlockKey {
    /// Takes 32 bytes as they are.
    #[must_use]
    pub const fn from_bytes(bytes: [u8; KEY_BYTES]) -> Self {
        Self(bytes)
    }

    /// The 32 bytes.
    #[must_use]
    pub const fn as_bytes(&self) -> &[u8; KEY_BYTES] {
        &self.0
    }
}

impl std::fmt::Debug for BlockKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("BlockKey(")?;
        self.0[..6].iter().try_for_each(|byte| write!(f, "{byte:02x}"))?;
        f.write_str("..)")
    }
}

/// Keys of consecutive blocks, borrowed from packed bytes without a copy.
#[derive(Clone, Copy, Debug)]
pub struct Keys<'a>(&'a [[u8; KEY_BYTES]]);

impl<'a> Keys<'a> {
    /// Reads `n * 32` bytes as `n` keys.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] when the length is no multiple of 32.
    pub fn packed(bytes: &'a [u8]) -> Result<Self, Error> {
        match bytes.as_chunks::<KEY_BYTES>() {
            (keys, []) => Ok(Self(keys)),
            (_, rest) => Err(Error::invalid(format!(
                "packed keys must be a multiple of {KEY_BYTES} bytes, but {} bytes leave {} over: join whole keys",
                bytes.len(),
                rest.len()
            ))),
        }
    }

    /// Takes keys that are already split.
    #[must_use]
    pub const fn from_slices(keys: &'a [[u8; KEY_BYTES]]) -> Self {
        Self(keys)
    }

    /// Number of keys.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there is no key.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Key `i`.
    ///
    /// # Panics
    /// When `i` is out of range.
    #[must_use]
    pub fn get(&self, i: usize) -> BlockKey {
        BlockKey(self.0[i])
    }

    /// The keys from `range`.
    ///
    /// # Panics
    /// When the range is out of bounds.
    #[must_use]
    pub fn slice(&self, range: std::ops::Range<usize>) -> Self {
        Self(&self.0[range])
    }

    /// The keys in order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = BlockKey> + 'a {
        self.0.iter().map(|bytes| BlockKey(*bytes))
    }
}

/// Names the blocks of one prompt as its tokens arrive.
///
/// `root = SHA-256("kvortex chain 1" ‖ namespace ‖ block_tokens as u32 ‖ extra)` and
/// `key[i] = SHA-256(key[i - 1] ‖ tokens of block i as u32 ‖ extra of block i)`, all little-endian, with `key[-1] = root`.
/// The number of tokens of a block is fixed by the root, so no two inputs have the same encoding.
#[derive(Clone, Debug)]
pub struct KeyChain {
    block_tokens: usize,
    root: [u8; KEY_BYTES],
    keys: Vec<u8>,
    partial: Vec<u32>,
}

/// SHA-256 of messages of one length, which differ only in a few bytes: padding is laid out once, and the compression
/// function runs straight on the blocks. A third faster than the streaming interface, where keys are a prompt's whole cost.
struct Message(Vec<[u8; 64]>);

/// The initial hash value of SHA-256 (FIPS 180-4, 5.3.3).
const INITIAL: [u32; 8] =
    [0x6a09_e667, 0xbb67_ae85, 0x3c6e_f372, 0xa54f_f53a, 0x510e_527f, 0x9b05_688c, 0x1f83_d9ab, 0x5be0_cd19];

impl Message {
    fn of_len(len: usize) -> Self {
        let mut blocks = vec![[0; 64]; (len + 9).div_ceil(64)];
        let bytes = blocks.as_flattened_mut();
        let end = bytes.len();
        bytes[len] = 0x80;
        bytes[end - 8..].copy_from_slice(&(len as u64 * 8).to_be_bytes());
        Self(blocks)
    }

    fn set(&mut self, at: usize, bytes: &[u8]) {
        self.0.as_flattened_mut()[at..at + bytes.len()].copy_from_slice(bytes);
    }

    fn set_tokens(&mut self, at: usize, tokens: &[u32]) {
        let (places, _) = self.0.as_flattened_mut()[at..].as_chunks_mut::<4>();
        places.iter_mut().zip(tokens).for_each(|(place, token)| *place = token.to_le_bytes());
    }

    fn digest(&self) -> [u8; KEY_BYTES] {
        let mut state = INITIAL;
        compress256(&mut state, &self.0);
        let mut digest = [0; KEY_BYTES];
        let (places, _) = digest.as_chunks_mut::<4>();
        places.iter_mut().zip(state).for_each(|(place, word)| *place = word.to_be_bytes());
        digest
    }
}

impl KeyChain {
    /// Starts a chain. `extra` is what the whole request adds to its identity: a LoRA digest, a tenant's salt.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] when `block_tokens` is 0 or above [`MAX_BLOCK_TOKENS`].
    pub fn new(namespace: &Namespace, block_tokens: usize, extra: &[u8]) -> Result<Self, Error> {
        if block_tokens == 0 || block_tokens > MAX_BLOCK_TOKENS {
            return Err(Error::invalid(format!(
                "block_tokens must be between 1 and {MAX_BLOCK_TOKENS}, not {block_tokens}: 16 is usual"
            )));
        }
        let root = Sha256::new()
            .chain_update(b"kvortex chain 1")
            .chain_update(namespace.digest())
            .chain_update((block_tokens as u32).to_le_bytes())
            .chain_update(extra);
        Ok(Self { block_tokens, root: root.finalize().into(), keys: Vec::new(), partial: Vec::new() })
    }

    /// Adds tokens and returns the packed keys of the blocks that became full. `extra` is mixed into exactly those blocks
    /// (an image's digest, say).
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] when the prompt would pass [`MAX_TOKENS`]; the chain is then unchanged.
    pub fn extend(&mut self, tokens: &[u32], extra: &[u8]) -> Result<&[u8], Error> {
        let total = self.num_tokens().saturating_add(tokens.len());
        if total > MAX_TOKENS {
            return Err(Error::invalid(format!(
                "a prompt may have at most {MAX_TOKENS} tokens, but this one would have {total}: cut it"
            )));
        }
        let before = self.keys.len();
        self.keys.reserve((self.partial.len() + tokens.len()) / self.block_tokens * KEY_BYTES);
        let mut message = self.message(extra);
        let rest = self.finish_partial(tokens, &mut message);
        let mut blocks = rest.chunks_exact(self.block_tokens);
        for block in &mut blocks {
            self.push_block(block, &mut message);
        }
        self.partial.extend_from_slice(blocks.remainder());
        Ok(&self.keys[before..])
    }

    /// The packed keys of all full blocks.
    #[must_use]
    pub fn keys(&self) -> &[u8] {
        &self.keys
    }

    /// Number of full blocks.
    #[must_use]
    pub const fn blocks(&self) -> usize {
        self.keys.len() / KEY_BYTES
    }

    /// Number of tokens added so far.
    #[must_use]
    pub const fn num_tokens(&self) -> usize {
        self.blocks() * self.block_tokens + self.partial.len()
    }

    /// Tokens of one block.
    #[must_use]
    pub const fn block_tokens(&self) -> usize {
        self.block_tokens
    }

    /// What is hashed for each block: parent, tokens, extra. Starts with the last block as parent.
    fn message(&self, extra: &[u8]) -> Message {
        let extra_at = KEY_BYTES + 4 * self.block_tokens;
        let mut message = Message::of_len(extra_at + extra.len());
        message.set(0, self.keys.last_chunk::<KEY_BYTES>().unwrap_or(&self.root));
        message.set(extra_at, extra);
        message
    }

    fn finish_partial<'t>(&mut self, tokens: &'t [u32], message: &mut Message) -> &'t [u32] {
        if self.partial.is_empty() {
            return tokens;
        }
        let missing = (self.block_tokens - self.partial.len()).min(tokens.len());
        let (head, rest) = tokens.split_at(missing);
        self.partial.extend_from_slice(head);
        if self.partial.len() == self.block_tokens {
            let block = std::mem::take(&mut self.partial);
            self.push_block(&block, message);
        }
        rest
    }

    fn push_block(&mut self, tokens: &[u32], message: &mut Message) {
        message.set_tokens(KEY_BYTES, tokens);
        let key = message.digest();
        message.set(0, &key);
        self.keys.extend_from_slice(&key);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chain(block_tokens: usize) -> KeyChain {
        KeyChain::new(&Namespace::default(), block_tokens, b"").unwrap()
    }

    /// The original hashed each chunk alone, so equal chunks at different places of a prompt shared their KV, though
    /// attention made them different.
    #[test]
    fn equal_blocks_at_different_places_have_different_keys() {
        let mut chain = chain(4);
        let keys = chain.extend(&[7, 7, 7, 7, 7, 7, 7, 7], b"").unwrap().to_vec();
        assert_ne!(keys[..KEY_BYTES], keys[KEY_BYTES..]);
    }

    #[test]
    fn a_key_is_the_documented_digest() {
        let mut ours = chain(2);
        ours.extend(&[1, 258, 3, 4], b"x").unwrap();
        let root = Sha256::new()
            .chain_update(b"kvortex chain 1")
            .chain_update(Namespace::default().digest())
            .chain_update([2, 0, 0, 0])
            .finalize();
        let first =
            Sha256::new().chain_update(root).chain_update([1, 0, 0, 0, 2, 1, 0, 0]).chain_update(b"x").finalize();
        let second =
            Sha256::new().chain_update(first).chain_update([3, 0, 0, 0, 4, 0, 0, 0]).chain_update(b"x").finalize();
        assert_eq!(ours.keys(), [first.as_slice(), second.as_slice()].concat());
    }

    #[test]
    fn our_padding_is_that_of_sha_256() {
        for len in 0..300 {
            let bytes: Vec<u8> = (0..len).map(|i| (i * 31 + len) as u8).collect();
            let mut message = Message::of_len(bytes.len());
            message.set(0, &bytes);
            assert_eq!(message.digest(), *Sha256::digest(&bytes), "{len} bytes");
        }
    }

    #[test]
    fn the_way_tokens_arrive_changes_nothing() {
        let tokens: Vec<u32> = (0..1000_u32).map(|i| i.wrapping_mul(2_654_435_761)).collect();
        let mut whole = chain(16);
        whole.extend(&tokens, b"").unwrap();
        for step in [1, 3, 15, 16, 17, 100] {
            let mut parts = chain(16);
            let mut seen = Vec::new();
            for part in tokens.chunks(step) {
                seen.extend_from_slice(parts.extend(part, b"").unwrap());
            }
            assert_eq!(seen, whole.keys());
            assert_eq!(parts.num_tokens(), 1000);
            assert_eq!(parts.blocks(), 62);
        }
    }

    #[test]
    fn everything_that_is_mixed_in_changes_the_keys() {
        let keys = |namespace: &Namespace, block: usize, root: &[u8], extra: &[u8]| {
            let mut chain = KeyChain::new(namespace, block, root).unwrap();
            chain.extend(&[1, 2, 3, 4], extra).unwrap();
            chain.keys()[..KEY_BYTES].to_vec()
        };
        let other = Namespace::from_digest([1; 32]);
        let all = [
            keys(&Namespace::default(), 4, b"", b""),
            keys(&other, 4, b"", b""),
            keys(&Namespace::default(), 2, b"", b""),
            keys(&Namespace::default(), 4, b"tenant", b""),
            keys(&Namespace::default(), 4, b"", b"image"),
        ];
        for (i, a) in all.iter().enumerate() {
            assert!(all[i + 1..].iter().all(|b| a != b), "{i}");
        }
    }

    #[test]
    fn too_many_tokens_change_nothing() {
        let mut chain = chain(MAX_BLOCK_TOKENS);
        chain.extend(&vec![1; MAX_TOKENS - 1], b"").unwrap();
        let error = chain.extend(&[1, 2], b"").unwrap_err().to_string();
        assert!(error.contains("16777217"), "{error}");
        assert_eq!(chain.num_tokens(), MAX_TOKENS - 1);
        chain.extend(&[1], b"").unwrap();
    }

    #[test]
    fn bad_block_sizes_and_lengths_are_named() {
        let error = KeyChain::new(&Namespace::default(), 0, b"").unwrap_err().to_string();
        assert!(error.contains("not 0"), "{error}");
        let error = Keys::packed(&[0; 33]).unwrap_err().to_string();
        assert!(error.contains("33 bytes leave 1 over"), "{error}");
        assert_eq!(Keys::packed(&[0; 64]).unwrap().len(), 2);
    }
}
