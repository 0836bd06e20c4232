//! An engine's name, and the names of the segments that belong to it.

/// The longest engine name, in bytes.
pub const NAME_MAX: usize = 64;

/// An engine's name: one to 64 of `A–Z a–z 0–9 _ -`. Every file name that is made from input is made from such a checked name.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct EngineName(String);

/// A name that no engine can have.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("expected an engine name of 1 to {NAME_MAX} characters out of A-Z a-z 0-9 _ -, got {0:?}")]
pub struct BadName(pub String);

impl EngineName {
    /// Checks a name.
    pub fn new(name: &str) -> Result<EngineName, BadName> {
        let good = (1..=NAME_MAX).contains(&name.len())
            && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_' || b == b'-');
        if good { Ok(EngineName(name.to_owned())) } else { Err(BadName(name.to_owned())) }
    }

    /// The name.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The name of the engine's own segment, which clients map read-only.
    #[must_use]
    pub fn engine_segment(&self) -> String {
        format!("/kvring.{}.engine", self.0)
    }

    /// The name of the lobby, where clients claim their entries.
    #[must_use]
    pub fn lobby(&self) -> String {
        format!("/kvring.{}.lobby", self.0)
    }

    /// The name of the arena.
    #[must_use]
    pub fn arena(&self) -> String {
        format!("/kvring.{}.arena", self.0)
    }

    /// The name of one client's channel.
    #[must_use]
    pub fn client(&self, entry: usize, nonce: u64) -> String {
        format!("/kvring.{}.client.{entry}.{nonce:016x}", self.0)
    }

    /// The beginning of the names of all segments of this engine (without the leading slash).
    #[must_use]
    pub fn prefix(&self) -> String {
        format!("kvring.{}.", self.0)
    }
}

impl core::str::FromStr for EngineName {
    type Err = BadName;

    fn from_str(name: &str) -> Result<EngineName, BadName> {
        EngineName::new(name)
    }
}

impl core::fmt::Display for EngineName {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_checked() {
        for good in ["a", "default", "A-b_9"] {
            assert!(EngineName::new(good).is_ok());
        }
        for bad in ["", "a/b", "..", "a.b", "ä", "a b", &"x".repeat(65)] {
            assert_eq!(EngineName::new(bad), Err(BadName(bad.to_owned())));
        }
    }
}
