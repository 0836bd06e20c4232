//! How a message's numbers lie in a ring's cell: in the order of their definition, 32-bit ones in halves of a word, the
//! low half first, 64-bit ones in whole words.

use super::{Ident, Records, Round};
use crate::abi::{Item, Message};
use crate::ring::{Body, WORDS};

/// Stands for `None` where the word offset of a parent key is optional.
pub(super) const NO_PARENT: u32 = u32::MAX;

/// The words of a cell's body, filled or emptied from the first on.
#[derive(Default)]
pub(super) struct Words {
    words: [u64; WORDS],
    /// The next half word.
    at: usize,
}

impl Words {
    /// Operation id; opcode or status; and the words, to be emptied.
    #[inline(always)]
    pub(super) fn of(body: &Body) -> (u16, u16, Words) {
        (body.head as u16, (body.head >> 16) as u16, Words { words: body.words, at: 0 })
    }

    /// The body that these words make.
    #[inline(always)]
    pub(super) fn body(self, operation: u16, code: u16) -> Body {
        Body { head: u32::from(operation) | u32::from(code) << 16, words: self.words }
    }

    #[inline(always)]
    fn half(&mut self) -> (usize, usize) {
        let at = self.at;
        self.at += 1;
        (at / 2, at % 2 * 32)
    }

    #[inline(always)]
    fn whole(&mut self) -> usize {
        let word = self.at.div_ceil(2);
        self.at = 2 * (word + 1);
        word
    }
}

/// A type of which a message may have arguments.
pub(super) trait Argument: Copy {
    fn put(self, words: &mut Words);
    fn take(words: &mut Words) -> Self;
}

impl Argument for u32 {
    #[inline(always)]
    fn put(self, words: &mut Words) {
        let (word, shift) = words.half();
        words.words[word] |= u64::from(self) << shift;
    }

    #[inline(always)]
    fn take(words: &mut Words) -> u32 {
        let (word, shift) = words.half();
        (words.words[word] >> shift) as u32
    }
}

impl Argument for u64 {
    #[inline(always)]
    fn put(self, words: &mut Words) {
        let word = words.whole();
        words.words[word] = self;
    }

    #[inline(always)]
    fn take(words: &mut Words) -> u64 {
        let word = words.whole();
        words.words[word]
    }
}

impl<const N: usize> Argument for [u64; N] {
    #[inline(always)]
    fn put(self, words: &mut Words) {
        self.into_iter().for_each(|word| word.put(words));
    }

    #[inline(always)]
    fn take(words: &mut Words) -> Self {
        core::array::from_fn(|_| u64::take(words))
    }
}

/// `None` is [`NO_PARENT`].
impl Argument for Option<u32> {
    #[inline(always)]
    fn put(self, words: &mut Words) {
        self.unwrap_or(NO_PARENT).put(words);
    }

    #[inline(always)]
    fn take(words: &mut Words) -> Option<u32> {
        let value = u32::take(words);
        (value != NO_PARENT).then_some(value)
    }
}

/// Structs whose fields are packed in this order.
macro_rules! packed {
    ($($name:ident { $($field:ident: $type:ty),+ })+) => {
        $(impl Argument for $name {
            #[inline(always)]
            fn put(self, words: &mut Words) {
                $(self.$field.put(words);)+
            }

            #[inline(always)]
            fn take(words: &mut Words) -> $name {
                $(let $field = <$type as Argument>::take(words);)+
                $name { $($field),+ }
            }
        })+

        pub(crate) const ABI: &[Item] = &[Item::Messages(&[$(Message {
            name: stringify!($name),
            opcode: 0,
            arguments: &[$((stringify!($field), stringify!($type))),+],
        }),+])];
    };
}

packed! {
    Ident { incarnation: u32, nonce: u32 }
    Round { number: u32, source: u32 }
    Records { offset: u32, count: u32 }
}

/// One word with this argument packed into it.
pub(super) fn word_of(argument: impl Argument) -> u64 {
    let mut words = Words::default();
    argument.put(&mut words);
    words.words[0]
}

/// The argument that [`word_of`] has packed into this word.
pub(super) fn from_word<T: Argument>(word: u64) -> T {
    let mut words = Words::default();
    words.words[0] = word;
    T::take(&mut words)
}
