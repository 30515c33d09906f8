//! Bytes for KVortex.
