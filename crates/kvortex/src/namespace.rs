//! The digest of everything that makes KV bytes incompatible.

use std::collections::BTreeMap;

use sha2::{Digest, Sha256};

/// The root of every key: two engines share blocks only when their namespaces are equal.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Namespace([u8; 32]);

impl Namespace {
    /// Takes a digest that was computed elsewhere.
    #[must_use]
    pub const fn from_digest(digest: [u8; 32]) -> Self {
        Self(digest)
    }

    /// The digest.
    #[must_use]
    pub const fn digest(&self) -> &[u8; 32] {
        &self.0
    }

    /// Starts with no field.
    #[must_use]
    pub fn builder() -> NamespaceBuilder {
        NamespaceBuilder::default()
    }
}

impl std::fmt::Display for Namespace {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// A value of a namespace field. Values of different types never have the same encoding.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// Known to be absent.
    None,
    /// A truth value.
    Bool(bool),
    /// A whole number.
    Int(i64),
    /// A number, by its bits.
    Float(f64),
    /// Text, as UTF-8.
    Text(String),
    /// Bytes, a digest say.
    Bytes(Vec<u8>),
    /// Values in order.
    List(Vec<Value>),
}

impl Value {
    fn absorb(&self, hash: &mut Sha256) {
        match self {
            Self::None => hash.update(b"n"),
            Self::Bool(value) => hash.update([b'b', u8::from(*value)]),
            Self::Int(value) => absorb_tagged(hash, b'i', &value.to_le_bytes()),
            Self::Float(value) => absorb_tagged(hash, b'f', &value.to_bits().to_le_bytes()),
            Self::Text(value) => absorb_tagged(hash, b't', value.as_bytes()),
            Self::Bytes(value) => absorb_tagged(hash, b'y', value),
            Self::List(values) => {
                absorb_tagged(hash, b'l', &(values.len() as u64).to_le_bytes());
                values.iter().for_each(|value| value.absorb(hash));
            }
        }
    }
}

/// Tag, length and bytes: an encoding that no other value shares.
fn absorb_tagged(hash: &mut Sha256, tag: u8, bytes: &[u8]) {
    hash.update([tag]);
    hash.update((bytes.len() as u64).to_le_bytes());
    hash.update(bytes);
}

/// Collects fields; their order does not matter, a field set twice keeps its last value.
#[derive(Clone, Debug, Default)]
pub struct NamespaceBuilder(BTreeMap<String, Value>);

impl NamespaceBuilder {
    /// Sets one field.
    #[must_use]
    pub fn field(mut self, name: &str, value: Value) -> Self {
        self.0.insert(name.to_owned(), value);
        self
    }

    /// The digest of all fields in the order of their names.
    #[must_use]
    pub fn finish(self) -> Namespace {
        let mut hash = Sha256::new_with_prefix(b"kvortex namespace 1");
        for (name, value) in &self.0 {
            absorb_tagged(&mut hash, b'k', name.as_bytes());
            value.absorb(&mut hash);
        }
        Namespace(hash.finalize().into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(fields: &[(&str, Value)]) -> Namespace {
        fields.iter().fold(Namespace::builder(), |builder, (name, value)| builder.field(name, value.clone())).finish()
    }

    #[test]
    fn order_does_not_matter() {
        let (a, b) = (("dtype", Value::Text("bf16".into())), ("layers", Value::Int(32)));
        assert_eq!(of(&[a.clone(), b.clone()]), of(&[b, a]));
    }

    #[test]
    fn values_that_look_alike_differ() {
        let text = |s: &str| Value::Text(s.into());
        let values = [
            Value::None,
            Value::Bool(false),
            Value::Int(0),
            Value::Float(0.0),
            text(""),
            text("0"),
            Value::Bytes(vec![]),
            Value::Bytes(b"0".to_vec()),
            Value::List(vec![]),
            Value::List(vec![Value::None]),
            Value::List(vec![text("a"), text("b")]),
            Value::List(vec![text("ab")]),
            Value::List(vec![Value::List(vec![text("a")]), text("b")]),
        ];
        let digests: std::collections::HashSet<_> = values.iter().map(|value| of(&[("x", value.clone())])).collect();
        assert_eq!(digests.len(), values.len());
    }

    #[test]
    fn a_name_cannot_run_into_its_value() {
        let text = |s: &str| Value::Text(s.into());
        assert_ne!(of(&[("ab", text("c"))]), of(&[("a", text("bc"))]));
        assert_ne!(of(&[("a", text("1")), ("b", text("2"))]), of(&[("a", text("1b2"))]));
    }
}
