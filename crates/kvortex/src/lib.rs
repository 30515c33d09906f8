//! The KVortex engine.
