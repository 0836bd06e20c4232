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

/// The keys `keys[every - 1::every]`, at most `limit` of them.
pub(crate) fn every(keys: &Bound<'_, PyAny>, every: usize, limit: usize) -> PyResult<Vec<Key>> {
    let py = keys.py();
    if every == 0 {
        return Err(errors::config(py, "every: expected at least 1, got 0"));
    }
    let at = |index: usize| move || format!("keys[{index}]");
    if let Ok(list) = keys.cast::<PyList>() {
        let count = (list.len() / every).min(limit);
        let places = (1..=count).map(|nth| nth * every - 1);
        return places.map(|index| key(py, &list.get_item(index)?, at(index))).collect();
    }
    let sequence = sequence(keys, "keys")?;
    let count = (sequence.len()? / every).min(limit);
    let places = (1..=count).map(|nth| nth * every - 1);
    places.map(|index| key(py, &sequence.get_item(index)?, at(index))).collect()
}

/// Salts the keys, so that only users of the same salt find or store under them. Keys are digests, so XOR with a fixed
/// value keeps them distinct.
pub(crate) fn salt(py: Python<'_>, keys: &mut [Key], salt: Option<&[u8]>) -> PyResult<()> {
    let Some(salt) = salt else { return Ok(()) };
    match salt.as_chunks::<8>() {
        ([low, high], []) => {
            let (low, high) = (u64::from_le_bytes(*low), u64::from_le_bytes(*high));
            keys.iter_mut().for_each(|key| *key = [key[0] ^ low, key[1] ^ high]);
            Ok(())
        }
        _ => Err(errors::config(py, format_args!("salt: expected {KEY_BYTES} bytes, got {}", salt.len()))),
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
