//! What `replay` and `chaos` share: the processes of a simulated vLLM, what they say to each other and how, and KV whose
//! every byte can be told right or wrong.

pub(crate) mod blocks;
pub(crate) mod child;
pub(crate) mod content;
pub(crate) mod pages;
pub(crate) mod pipe;
pub(crate) mod shape;
pub(crate) mod shm;
pub(crate) mod signals;
pub(crate) mod wire;
