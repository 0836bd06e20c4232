//! Places at which a test may end the process, and rules that it may break: to see that a death there is survived, and
//! that the checks see what each rule is for. Nothing of it is in a build without the feature `failpoints`, which only
//! tests switch on.
//!
//! ```text
//! KVRING_FAIL_POINT=commit.word        SIGKILL at the first time that the process comes there
//! KVRING_FAIL_POINT=commit.word:3      at the third time
//! KVRING_FAIL_POINT=commit.word:3:stop SIGSTOP instead: somebody else goes on, then this process does
//! KVRING_FAIL_POINT=commit.word:3:pause only a pause, of 50 ms
//! KVRING_FAIL_POINT=commit.word:3:panic a panic
//! KVRING_BREAK=rounds                  the rule of that name does not hold
//! KVRING_WITHOUT=robust,waitv          these means of the kernel are not there (see `probe`)
//! ```

/// Ends (or stops, or delays) the process here, if a test asks for it.
#[inline(always)]
pub fn here(_place: &str) {
    #[cfg(all(feature = "failpoints", not(loom)))]
    on::here(_place);
}

/// Is the rule of this name to be broken?
#[inline(always)]
#[must_use]
pub fn broken(_rule: &str) -> bool {
    #[cfg(all(feature = "failpoints", not(loom)))]
    return on::broken(_rule);
    #[cfg(not(all(feature = "failpoints", not(loom))))]
    false
}

/// Is this one of the kernel's means to look as if it were not there?
#[inline(always)]
#[must_use]
pub fn without(_means: &str) -> bool {
    #[cfg(all(feature = "failpoints", not(loom)))]
    return on::without(_means);
    #[cfg(not(all(feature = "failpoints", not(loom))))]
    false
}

#[cfg(all(feature = "failpoints", not(loom)))]
mod on {
    use crate::sync::{AtomicU32, Ordering};
    use nix::sys::signal::{Signal, raise};
    use std::sync::OnceLock;

    enum Act {
        Signal(Signal),
        Pause,
        Panic,
    }

    struct Wanted {
        place: String,
        time: u32,
        act: Act,
    }

    fn parse(text: &str) -> Wanted {
        let mut parts = text.split(':');
        let place = parts.next().unwrap_or_default().to_owned();
        let time = parts.next().and_then(|time| time.parse().ok()).unwrap_or(1);
        let act = match parts.next() {
            Some("stop") => Act::Signal(Signal::SIGSTOP),
            Some("pause") => Act::Pause,
            Some("panic") => Act::Panic,
            _ => Act::Signal(Signal::SIGKILL),
        };
        Wanted { place, time, act }
    }

    pub(super) fn here(place: &str) {
        static WANTED: OnceLock<Option<Wanted>> = OnceLock::new();
        static TIMES: AtomicU32 = AtomicU32::new(0);
        let wanted = WANTED.get_or_init(|| std::env::var("KVRING_FAIL_POINT").ok().map(|text| parse(&text)));
        if let Some(wanted) = wanted
            && wanted.place == place
            && TIMES.fetch_add(1, Ordering::Relaxed) + 1 == wanted.time
        {
            match wanted.act {
                // It can only fail for a signal that does not exist.
                Act::Signal(signal) => drop(raise(signal)),
                Act::Pause => std::thread::sleep(std::time::Duration::from_millis(50)),
                Act::Panic => panic!("fail point {place}"),
            }
        }
    }

    pub(super) fn broken(rule: &str) -> bool {
        static BROKEN: OnceLock<Option<String>> = OnceLock::new();
        BROKEN.get_or_init(|| std::env::var("KVRING_BREAK").ok()).as_deref() == Some(rule)
    }

    /// Not cached: who asks keeps the answer.
    pub(super) fn without(means: &str) -> bool {
        std::env::var("KVRING_WITHOUT").is_ok_and(|list| list.split(',').any(|one| one == means))
    }
}
