//! Sizes as people write them: `8GiB`, `512MiB`, `1.5GiB`, or a number of bytes.

use core::fmt;
use core::str::FromStr;

/// A number of bytes. `Display` is exact and parses back; [`ByteSize::human`] is rounded, for messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ByteSize(pub u64);

/// A size that cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("expected a size such as 8GiB, 512MiB, 1.5GiB or a number of bytes (below 16EiB), got {0:?}")]
pub struct BadByteSize(pub String);

/// Units of 1024, largest first, in the form that is printed.
const BINARY: [(&str, u64); 4] = [("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)];

/// All units that are understood, in lower case. A bare letter means the binary unit, as for docker and the JVM;
/// `MB` and the like are SI's decimal units.
const UNITS: [(&str, u64); 14] = [
    ("", 1),
    ("b", 1),
    ("k", 1 << 10),
    ("kib", 1 << 10),
    ("kb", 1_000),
    ("m", 1 << 20),
    ("mib", 1 << 20),
    ("mb", 1_000_000),
    ("g", 1 << 30),
    ("gib", 1 << 30),
    ("gb", 1_000_000_000),
    ("t", 1 << 40),
    ("tib", 1 << 40),
    ("tb", 1_000_000_000_000),
];

impl ByteSize {
    /// Rounded to one decimal of the largest fitting unit: `23.5GiB`.
    #[must_use]
    pub fn human(self) -> String {
        match BINARY.iter().find(|(_, unit)| self.0 >= *unit) {
            Some((name, unit)) => {
                // In tenths, rounded down: a message never promises more than there is.
                let tenths = u128::from(self.0) * 10 / u128::from(*unit);
                if tenths % 10 == 0 {
                    format!("{}{name}", tenths / 10)
                } else {
                    format!("{}.{}{name}", tenths / 10, tenths % 10)
                }
            }
            None => format!("{}B", self.0),
        }
    }
}

impl FromStr for ByteSize {
    type Err = BadByteSize;

    fn from_str(text: &str) -> Result<ByteSize, BadByteSize> {
        let bad = || BadByteSize(text.to_owned());
        let trimmed = text.trim();
        let number_len = trimmed.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(trimmed.len());
        let (number, unit) = trimmed.split_at(number_len);
        let unit = unit.trim().to_ascii_lowercase();
        let (_, scale) = UNITS.iter().find(|(name, _)| *name == unit).ok_or_else(bad)?;
        let (whole, fraction) = number.split_once('.').unwrap_or((number, "0"));
        // Twelve decimals of a TiB are a byte, so more would mean nothing; and with this limit the arithmetic fits into 128
        // bits.
        if whole.is_empty() || fraction.is_empty() || fraction.len() > 12 {
            return Err(bad());
        }
        let whole: u64 = whole.parse().map_err(|_| bad())?;
        let numerator: u128 = fraction.parse().map_err(|_| bad())?;
        let denominator = 10u128.pow(u32::try_from(fraction.len()).map_err(|_| bad())?);
        let bytes = u128::from(whole) * u128::from(*scale) + numerator * u128::from(*scale) / denominator;
        u64::try_from(bytes).map(ByteSize).map_err(|_| bad())
    }
}

impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match BINARY.iter().find(|(_, unit)| self.0 > 0 && self.0.is_multiple_of(*unit)) {
            Some((name, unit)) => write!(f, "{}{name}", self.0 / unit),
            None => write!(f, "{}", self.0),
        }
    }
}

/// For configuration files and output.
#[cfg(feature = "serde")]
mod with_serde {
    use super::ByteSize;
    use core::fmt;
    use serde::de::{Error as _, Unexpected, Visitor};
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    impl Serialize for ByteSize {
        fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
            serializer.collect_str(self)
        }
    }

    impl<'de> Deserialize<'de> for ByteSize {
        fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<ByteSize, D::Error> {
            struct Size;
            impl Visitor<'_> for Size {
                type Value = ByteSize;

                fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                    f.write_str("a size such as \"8GiB\", or a number of bytes")
                }

                fn visit_u64<E: serde::de::Error>(self, bytes: u64) -> Result<ByteSize, E> {
                    Ok(ByteSize(bytes))
                }

                fn visit_i64<E: serde::de::Error>(self, bytes: i64) -> Result<ByteSize, E> {
                    u64::try_from(bytes)
                        .map(ByteSize)
                        .map_err(|_| E::invalid_value(Unexpected::Signed(bytes), &self))
                }

                fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<ByteSize, E> {
                    text.parse().map_err(E::custom)
                }
            }
            deserializer.deserialize_any(Size).map_err(D::Error::custom)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_as_people_write_them() {
        for (text, bytes) in [
            ("0", 0),
            ("4096", 4096),
            ("8GiB", 8 << 30),
            ("8 gib", 8 << 30),
            ("8g", 8 << 30),
            ("8GB", 8_000_000_000),
            ("512MiB", 512 << 20),
            ("1.5GiB", 3 << 29),
            ("64k", 64 << 10),
            ("2T", 2 << 40),
            (" 12 B ", 12),
        ] {
            assert_eq!(text.parse(), Ok(ByteSize(bytes)), "{text}");
        }
    }

    #[test]
    fn what_is_no_size_is_refused() {
        for text in [
            "",
            "GiB",
            "-1",
            "1..2GiB",
            "1.",
            ".5GiB",
            "8GiBs",
            "8 G iB",
            "16777216TiB",
            "99999999999999999999",
            "0x10",
        ] {
            assert_eq!(text.parse::<ByteSize>(), Err(BadByteSize(text.to_owned())), "{text}");
        }
    }

    #[test]
    fn printing_is_exact_and_parses_back() {
        for (bytes, text) in
            [(0, "0"), (8 << 30, "8GiB"), (3 << 29, "1536MiB"), (4096, "4KiB"), ((8 << 30) + 1, "8589934593")]
        {
            assert_eq!(ByteSize(bytes).to_string(), text);
            assert_eq!(text.parse(), Ok(ByteSize(bytes)));
        }
        assert_eq!(ByteSize((47 << 29) + 5).human(), "23.5GiB");
        assert_eq!(ByteSize(64 << 20).human(), "64MiB");
        assert_eq!(ByteSize(1023).human(), "1023B");
    }
}
