//! The only place with raw atomics.
//!
//! `clippy.toml` forbids `std::sync::atomic` types everywhere else. These wrappers have the same layout (they live in
//! shared memory) and the few operations that the protocols use; under `--cfg loom` they hold loom's types instead, so
//! that the model checker sees every atomic of every protocol. Other crates take their atomics from here too.
#![allow(clippy::disallowed_types, reason = "this is the one module that may name them")]

#[cfg(not(loom))]
use core::sync::atomic as raw;
#[cfg(loom)]
use loom::sync::atomic as raw;

#[cfg(not(loom))]
pub use core::hint::spin_loop;
#[cfg(loom)]
pub use loom::hint::spin_loop;

pub use raw::{Ordering, fence};

macro_rules! atomic {
    ($(#[$doc:meta])* $name:ident, $value:ty) => {
        $(#[$doc])*
        #[repr(transparent)]
        #[derive(Debug)]
        pub struct $name(raw::$name);

        impl $name {
            /// A new atomic in private memory.
            #[cfg(not(loom))]
            #[must_use]
            pub const fn new(value: $value) -> Self {
                $name(raw::$name::new(value))
            }

            /// A new atomic in private memory.
            #[cfg(loom)]
            #[must_use]
            pub fn new(value: $value) -> Self {
                $name(raw::$name::new(value))
            }

            /// As [`core::sync::atomic`].
            #[inline(always)]
            pub fn load(&self, order: Ordering) -> $value {
                self.0.load(order)
            }

            /// As [`core::sync::atomic`].
            #[inline(always)]
            pub fn store(&self, value: $value, order: Ordering) {
                self.0.store(value, order);
            }

            /// As [`core::sync::atomic`].
            #[inline(always)]
            pub fn swap(&self, value: $value, order: Ordering) -> $value {
                self.0.swap(value, order)
            }

            /// As [`core::sync::atomic`].
            #[inline(always)]
            pub fn compare_exchange(
                &self,
                current: $value,
                new: $value,
                success: Ordering,
                failure: Ordering,
            ) -> Result<$value, $value> {
                self.0.compare_exchange(current, new, success, failure)
            }
        }
    };
}

macro_rules! arithmetic {
    ($name:ident, $value:ty) => {
        impl $name {
            /// As [`core::sync::atomic`].
            #[inline(always)]
            pub fn fetch_add(&self, value: $value, order: Ordering) -> $value {
                self.0.fetch_add(value, order)
            }

            /// As [`core::sync::atomic`].
            #[inline(always)]
            pub fn fetch_or(&self, value: $value, order: Ordering) -> $value {
                self.0.fetch_or(value, order)
            }

            /// As [`core::sync::atomic`].
            #[inline(always)]
            pub fn fetch_and(&self, value: $value, order: Ordering) -> $value {
                self.0.fetch_and(value, order)
            }

            /// As [`core::sync::atomic`].
            #[inline(always)]
            pub fn fetch_sub(&self, value: $value, order: Ordering) -> $value {
                self.0.fetch_sub(value, order)
            }
        }
    };
}

atomic!(
    /// A boolean; for process-private flags only: not every bit pattern is a value.
    AtomicBool, bool
);
atomic!(
    /// 32 bits: every futex word.
    AtomicU32, u32
);
atomic!(
    /// 64 bits.
    AtomicU64, u64
);
arithmetic!(AtomicU32, u32);
arithmetic!(AtomicU64, u64);

#[cfg(not(loom))]
impl AtomicU32 {
    /// For the kernel: the futex calls take the plain type.
    pub(crate) fn raw(&self) -> &raw::AtomicU32 {
        &self.0
    }
}
