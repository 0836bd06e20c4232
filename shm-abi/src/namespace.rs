//! The id of a namespace: what requests, slot headers and chunk records name it by.
//!
//! The low 8 bits are its index in the engine's table of namespaces. An index is given to another namespace when its
//! namespace has been forgotten, so the other 24 bits count how many have begun there. A client that still has the id of a
//! namespace that is gone finds nothing by it, and shares nothing with another client that has that id too.

const INDEX_BITS: u32 = 8;

/// The id of the namespace that was the `begins`-th to begin at this index. Only the low 24 bits of `begins` count.
#[must_use]
pub const fn namespace_id(index: u8, begins: u32) -> u32 {
    begins << INDEX_BITS | index as u32
}

/// The index in an id. An id that a peer has sent may have any index.
#[inline(always)]
#[must_use]
pub const fn namespace_index(id: u32) -> u8 {
    id as u8
}

const _: () = assert!(INDEX_BITS == u8::BITS);
