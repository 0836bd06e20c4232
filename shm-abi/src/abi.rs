//! What two processes must agree on, described by the code that defines it.
//!
//! Everything that has a place or a number in shared memory is defined inside [`abi!`](crate::abi!), once: records with their
//! fields, enums with their numbers, constants. The macro makes two things of an item: the item itself, and a description of it. A
//! module's descriptions are its `ABI`, and [`LAYOUT_HASH`](crate::layout::LAYOUT_HASH) is a hash of those of all modules.
//! No description can be forgotten: a type that is looked at in a mapping must be [`Shared`](crate::mapping::Shared), one that
//! travels through a payload area a [`Record`](crate::message::Record); both must be [`Described`], which only the macro
//! implements; and an `ABI` that the hash leaves out is dead code, which is an error here.
//!
//! `tests/abi.txt` has all descriptions in words, so that authors and reviewers see what a change does to them.

/// One type as it lies in memory.
#[derive(Clone, Copy, Debug)]
pub struct Type {
    /// Its name.
    pub name: &'static str,
    /// Bytes.
    pub size: usize,
    /// The alignment of its address, in bytes.
    pub align: usize,
    /// What it is made of.
    pub of: Of,
}

/// What a type is made of.
#[derive(Clone, Copy, Debug)]
pub enum Of {
    /// A number, or bytes that nobody looks at.
    Itself,
    /// So many of another type: an array, or a newtype, which has one.
    Many(&'static Type, usize),
    /// Fields.
    Fields(&'static [Field]),
    /// Numbers that have names.
    Numbers(&'static [(&'static str, u64)]),
}

/// One field of a record.
#[derive(Clone, Copy, Debug)]
pub struct Field {
    /// Its name.
    pub name: &'static str,
    /// Bytes from the record's first one.
    pub offset: usize,
    /// What it holds.
    pub of: &'static Type,
}

/// A message: its name, its number, and its arguments in the order in which they are packed.
#[derive(Clone, Copy, Debug)]
pub struct Message {
    /// Its name.
    pub name: &'static str,
    /// Its number.
    pub opcode: u8,
    /// Name and type of each.
    pub arguments: &'static [(&'static str, &'static str)],
}

/// One thing that a module defines.
#[derive(Clone, Copy, Debug)]
pub enum Item {
    /// A type.
    Type(&'static Type),
    /// A constant.
    Number(&'static str, u64),
    /// Messages.
    Messages(&'static [Message]),
}

/// A type with a description of how it lies in memory.
pub trait Described {
    /// The description.
    const TYPE: &'static Type;
}

macro_rules! itself {
    ($($name:ty),+) => {
        $(impl Described for $name {
            const TYPE: &'static Type = &Type::itself::<$name>(stringify!($name));
        })+
    };
}

use crate::sync::{AtomicU32, AtomicU64};
itself!(u8, u32, u64, AtomicU32, AtomicU64);

impl<T: Described, const N: usize> Described for [T; N] {
    const TYPE: &'static Type = &Type { of: Of::Many(T::TYPE, N), ..Type::itself::<Self>("array") };
}

impl Type {
    /// Describes a type without parts.
    #[must_use]
    pub const fn itself<T>(name: &'static str) -> Type {
        Type { name, size: size_of::<T>(), align: align_of::<T>(), of: Of::Itself }
    }
}

/// Defines records, enums and constants that are in shared memory, and `ABI`, which describes them.
///
/// An enum is written with the type of its numbers, `enum Role: u32`; its `from_number` finds the variant with a number.
#[macro_export]
macro_rules! abi {
    (@next [$($known:tt)*]) => {
        #[cfg_attr(loom, allow(dead_code, reason = "models have no superblock"))]
        pub(crate) const ABI: &[$crate::abi::Item] = &[$($known)*];
    };
    (@next [$($known:tt)*]
        $(#[$meta:meta])* $vis:vis const $name:ident: $type:ty = $value:expr; $($rest:tt)*
    ) => {
        $(#[$meta])* $vis const $name: $type = $value;
        $crate::abi!(@next [$($known)* $crate::abi::Item::Number(stringify!($name), $name as u64),] $($rest)*);
    };
    (@next [$($known:tt)*]
        $(#[$meta:meta])* $vis:vis enum $name:ident: $repr:ident {
            $($(#[$of:meta])* $variant:ident = $number:literal,)+
        } $($rest:tt)*
    ) => {
        $(#[$meta])*
        #[repr($repr)]
        $vis enum $name { $($(#[$of])* $variant = $number,)+ }

        impl $name {
            /// The variant with this number, if there is one.
            #[must_use]
            #[inline]
            $vis const fn from_number(number: u64) -> Option<$name> {
                match number {
                    $($number => Some($name::$variant),)+
                    _ => None,
                }
            }
        }

        impl $crate::abi::Described for $name {
            const TYPE: &'static $crate::abi::Type = &$crate::abi::Type {
                of: $crate::abi::Of::Numbers(&[$((stringify!($variant), $number)),+]),
                ..$crate::abi::Type::itself::<$name>(stringify!($name))
            };
        }

        $crate::abi!(@next [$($known)*
            $crate::abi::Item::Type(<$name as $crate::abi::Described>::TYPE),
        ] $($rest)*);
    };
    (@next [$($known:tt)*]
        $(#[$meta:meta])* $vis:vis struct $name:ident($type:ty); $($rest:tt)*
    ) => {
        $(#[$meta])* $vis struct $name($type);

        impl $crate::abi::Described for $name {
            const TYPE: &'static $crate::abi::Type = &$crate::abi::Type {
                of: $crate::abi::Of::Many(<$type as $crate::abi::Described>::TYPE, 1),
                ..$crate::abi::Type::itself::<$name>(stringify!($name))
            };
        }

        $crate::abi!(@next [$($known)*
            $crate::abi::Item::Type(<$name as $crate::abi::Described>::TYPE),
        ] $($rest)*);
    };
    (@next [$($known:tt)*]
        $(#[$meta:meta])* $vis:vis struct $name:ident {
            $($(#[$of:meta])* $field_vis:vis $field:ident: $type:ty,)+
        } $($rest:tt)*
    ) => {
        $(#[$meta])* $vis struct $name { $($(#[$of])* $field_vis $field: $type,)+ }

        impl $crate::abi::Described for $name {
            const TYPE: &'static $crate::abi::Type = &$crate::abi::Type {
                of: $crate::abi::Of::Fields(&[$($crate::abi::Field {
                    name: stringify!($field),
                    offset: core::mem::offset_of!($name, $field),
                    of: <$type as $crate::abi::Described>::TYPE,
                }),+]),
                ..$crate::abi::Type::itself::<$name>(stringify!($name))
            };
        }

        $crate::abi!(@next [$($known)*
            $crate::abi::Item::Type(<$name as $crate::abi::Described>::TYPE),
        ] $($rest)*);
    };
    (@$($wrong:tt)*) => { compile_error!(concat!("not an item of an ABI: ", stringify!($($wrong)*))); };
    ($($items:tt)*) => { $crate::abi!(@next [] $($items)*); };
}

impl core::fmt::Display for Item {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self {
            Item::Type(of) => {
                writeln!(f, "{}: {} bytes, aligned to {}", of.name, of.size, of.align)?;
                match of.of {
                    Of::Itself => Ok(()),
                    Of::Many(..) => writeln!(f, "  {}", Short(of)),
                    Of::Fields(fields) => fields.iter().try_for_each(|field| {
                        writeln!(f, "  {:>4} {}: {}", field.offset, field.name, Short(field.of))
                    }),
                    Of::Numbers(numbers) => {
                        numbers.iter().try_for_each(|(name, number)| writeln!(f, "  {number:>4} {name}"))
                    }
                }
            }
            Item::Number(name, number) => writeln!(f, "{name} = {number}"),
            Item::Messages(messages) => {
                messages.iter().try_for_each(|Message { name, opcode, arguments }| {
                    writeln!(f, "{opcode} {name}")?;
                    arguments.iter().try_for_each(|(name, of)| writeln!(f, "     {name}: {of}"))
                })
            }
        }
    }
}

/// A type in a word or two.
struct Short(&'static Type);

impl core::fmt::Display for Short {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self.0.of {
            Of::Many(one, count) => write!(f, "{count} × {}", Short(one)),
            _ => write!(f, "{}, {} bytes", self.0.name, self.0.size),
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    #[test]
    fn numbers_that_name_nothing_are_nothing() {
        use crate::slot::SlotState;
        assert_eq!(
            (0..6).filter_map(SlotState::from_number).map(|state| state as u64).collect::<Vec<_>>(),
            [0, 1, 2, 3]
        );
    }
}
