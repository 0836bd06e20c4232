//! Short texts in words of shared memory: names of models, clients and policies.

use crate::sync::{AtomicU64, Ordering};

/// Stores zero-padded text as words.
pub fn store_text(words: &[AtomicU64], text: &[u8]) {
    for (index, word) in words.iter().enumerate() {
        let mut bytes = [0u8; 8];
        for (to, from) in bytes.iter_mut().zip(text.iter().skip(index * 8)) {
            *to = *from;
        }
        word.store(u64::from_le_bytes(bytes), Ordering::Relaxed);
    }
}

/// Loads zero-padded text; bytes that are not UTF-8 are replaced.
#[must_use]
pub fn load_text(words: &[AtomicU64]) -> String {
    let bytes: Vec<u8> = words.iter().flat_map(|word| word.load(Ordering::Relaxed).to_le_bytes()).collect();
    let end = bytes.iter().position(|b| *b == 0).unwrap_or(bytes.len());
    String::from_utf8_lossy(&bytes[..end]).into_owned()
}
