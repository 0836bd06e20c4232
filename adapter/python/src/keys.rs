//! Keys and block ids from Python's sequences.

use crate::errors;
use kvring_adapter::Key;
use pyo3::exceptions::PyTypeError;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyList, PySequence};

/// How many bytes of a key are used.
pub(crate) const KEY_BYTES: usize = 16;

/// A key's first 16 bytes, as two little-endian words.
fn key(py: Python<'_>, item: &Bound<'_, PyAny>, name: impl Fn() -> String) -> PyResult<Key> {
    let Ok(bytes) = item.cast::<PyBytes>() else {
        let got = item.get_type().name()?;
        let text = format!("{}: expected bytes of at least {KEY_BYTES} bytes, got {got}", name());
        return Err(PyTypeError::new_err(text));
    };
    let bytes = bytes.as_bytes();
    let (words, _) = bytes.as_chunks::<8>();
    match words {
        [low, high, ..] => Ok([u64::from_le_bytes(*low), u64::from_le_bytes(*high)]),
        _ => {
            let text = format!("{}: expected at least {KEY_BYTES} bytes, got {}", name(), bytes.len());
            Err(errors::config(py, text))
        }
    }
}

/// The keys `keys[every - 1::every]` of a sequence, salted, read one by one as they are asked for.
///
/// A salt makes sure that only users of the same salt find or store under the keys. Keys are digests, so XOR with a fixed value
/// keeps them distinct.
pub(crate) struct Every<'a, 'py> {
    keys: &'a Bound<'py, PyAny>,
    every: usize,
    count: usize,
    at: usize,
    salt: Key,
    error: Option<PyErr>,
}

impl<'a, 'py> Every<'a, 'py> {
    pub(crate) fn new(
        keys: &'a Bound<'py, PyAny>,
        every: usize,
        salt: Option<&[u8]>,
    ) -> PyResult<Every<'a, 'py>> {
        let py = keys.py();
        if every == 0 {
            return Err(errors::config(py, "every: expected at least 1, got 0"));
        }
        let salt = match salt.map(<[u8]>::as_chunks::<8>) {
            None => [0; 2],
            Some(([low, high], [])) => [u64::from_le_bytes(*low), u64::from_le_bytes(*high)],
            Some((words, rest)) => {
                let got = words.len() * 8 + rest.len();
                return Err(errors::config(py, format_args!("salt: expected {KEY_BYTES} bytes, got {got}")));
            }
        };
        let len = match keys.cast::<PyList>() {
            Ok(list) => list.len(),
            Err(_) => sequence(keys, "keys")?.len()?,
        };
        Ok(Every { keys, every, count: len / every, at: 0, salt, error: None })
    }

    /// How many keys there are.
    pub(crate) fn total(&self) -> usize {
        self.count
    }

    /// All keys.
    pub(crate) fn all(mut self) -> PyResult<Vec<Key>> {
        let keys = self.by_ref().collect();
        self.check()?;
        Ok(keys)
    }

    /// Does reading them run no code of Python's? Only then may a lock be held meanwhile.
    pub(crate) fn are_in_a_list(&self) -> bool {
        self.keys.cast::<PyList>().is_ok()
    }

    /// Has an error ended the keys?
    pub(crate) fn is_wrong(&self) -> bool {
        self.error.is_some()
    }

    /// The error that has ended the keys, if one has.
    pub(crate) fn check(self) -> PyResult<()> {
        self.error.map_or(Ok(()), Err)
    }

    fn read(&self, index: usize) -> PyResult<Key> {
        let item = match self.keys.cast::<PyList>() {
            Ok(list) => list.get_item(index)?,
            Err(_) => sequence(self.keys, "keys")?.get_item(index)?,
        };
        let [low, high] = key(self.keys.py(), &item, || format!("keys[{index}]"))?;
        Ok([low ^ self.salt[0], high ^ self.salt[1]])
    }
}

impl Iterator for Every<'_, '_> {
    type Item = Key;

    fn next(&mut self) -> Option<Key> {
        if self.at == self.count || self.error.is_some() {
            return None;
        }
        self.at += 1;
        self.read(self.at * self.every - 1).map_err(|error| self.error = Some(error)).ok()
    }
}

/// One key.
pub(crate) fn one(item: &Bound<'_, PyAny>, name: &str) -> PyResult<Key> {
    key(item.py(), item, || name.to_owned())
}

fn sequence<'a, 'py>(value: &'a Bound<'py, PyAny>, name: &str) -> PyResult<&'a Bound<'py, PySequence>> {
    value.cast::<PySequence>().map_err(|_| match value.get_type().name() {
        Ok(got) => PyTypeError::new_err(format!("{name}: expected a sequence, got {got}")),
        Err(error) => error,
    })
}

/// Block ids.
pub(crate) fn blocks(blocks: &Bound<'_, PyAny>) -> PyResult<Vec<u32>> {
    let id = |index: usize, item: Bound<'_, PyAny>| {
        item.extract::<u32>().map_err(|error| {
            let py = item.py();
            if error.is_instance_of::<PyTypeError>(py) {
                return error;
            }
            errors::layout(py, format_args!("blocks[{index}]: expected a block id below 2^32, got {item}"))
        })
    };
    if let Ok(list) = blocks.cast::<PyList>() {
        return list.iter().enumerate().map(|(index, item)| id(index, item)).collect();
    }
    let sequence = sequence(blocks, "blocks")?;
    (0..sequence.len()?).map(|index| id(index, sequence.get_item(index)?)).collect()
}
