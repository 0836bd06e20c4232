//! A client's options and their defaults.

use kvring_shm_abi::channel::{PAYLOAD_BYTES_USUAL, PAYLOAD_WORDS_MAX, PAYLOAD_WORDS_MIN};
use kvring_shm_abi::segment::{BadName, EngineName};
use std::time::{Duration, Instant};

/// The engine's name if none is given.
pub const DEFAULT_ENGINE: &str = "default";

/// How a client attaches, and how long it waits for what. All timeouts of a client are here.
///
/// # Example
/// ```
/// use kvring_adapter::{Client, ClientOptions, ConfigError, Role};
/// use std::time::Duration;
///
/// let patient = ClientOptions {
///     engine: "of-mine".to_owned(),
///     operation_timeout: Duration::from_secs(10),
///     ..ClientOptions::default()
/// };
/// assert!(Client::new(Role::Worker, patient).is_ok());
/// let wrong = ClientOptions { stall_after: Duration::ZERO, ..ClientOptions::default() };
/// assert_eq!(Client::new(Role::Worker, wrong).err(), Some(ConfigError::ZeroDuration("stall_after")));
/// ```
#[derive(Clone, Debug)]
pub struct ClientOptions {
    /// The engine's name, as in `kvring serve --name`. Default `default`.
    pub engine: String,
    /// This client's name in `kvring status`. Default: the process name and id.
    pub client: String,
    /// How long one attempt to attach may take before the keeper cleans up and tries again. Default 5 s.
    pub attach_timeout: Duration,
    /// How long `register_kv_caches` waits for the engine's answer; the keeper goes on trying. Default 5 s.
    pub register_timeout: Duration,
    /// How long a worker waits for the answer to a reservation or a commit, and a caller of `clear` for its answer.
    /// Default 2 s.
    pub operation_timeout: Duration,
    /// How long `shutdown` waits for open jobs, and then for the engine's answer. It always waits for a copy that runs.
    /// Default 5 s.
    pub drain_timeout: Duration,
    /// When a store's blocks are wanted (a flush): how long after its submission its copies may still begin. Shards
    /// whose copy has not begun by then are dropped; the flush always waits for a copy that runs. Default 200 ms.
    pub flush_timeout: Duration,
    /// How long the engine's beat may stand still, while this client looks at it, before the engine counts as stalled.
    /// Default 2 s.
    pub stall_after: Duration,
    /// How long a caller that waits for an answer spins before it sleeps. `None`: 20 µs, or not at all if this process
    /// may run on one CPU only, because spinning would keep the engine from running.
    pub spin: Option<Duration>,
    /// The keeper's first pause after a failed attempt to attach, doubled up to `backoff_max`. Default 5 ms.
    pub backoff_min: Duration,
    /// The longest pause between attempts. Default 500 ms.
    pub backoff_max: Duration,
    /// Bytes of the channel's payload area, for key and slot lists. Default 4 MiB: 8192 chunks of 16 ranks at once.
    pub payload_bytes: usize,
}

impl Default for ClientOptions {
    fn default() -> Self {
        let process = std::env::current_exe()
            .ok()
            .and_then(|path| path.file_name().map(|name| name.to_string_lossy().into_owned()))
            .unwrap_or_else(|| "client".to_owned());
        ClientOptions {
            engine: DEFAULT_ENGINE.to_owned(),
            client: format!("{process}:{}", std::process::id()),
            attach_timeout: Duration::from_secs(5),
            register_timeout: Duration::from_secs(5),
            operation_timeout: Duration::from_secs(2),
            drain_timeout: Duration::from_secs(5),
            flush_timeout: Duration::from_millis(200),
            stall_after: Duration::from_secs(2),
            spin: None,
            backoff_min: Duration::from_millis(5),
            backoff_max: Duration::from_millis(500),
            payload_bytes: PAYLOAD_BYTES_USUAL,
        }
    }
}

/// Options that cannot work. Reported when a client is made, never later.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// The engine's name is not a valid one.
    #[error(transparent)]
    Name(#[from] BadName),
    /// The payload area's size is out of range.
    #[error("payload_bytes: expected {min} to {max}, got {got}")]
    PayloadBytes {
        /// Smallest.
        min: usize,
        /// Largest.
        max: usize,
        /// Given.
        got: usize,
    },
    /// A duration of zero where the client must wait for somebody.
    #[error("{0}: expected a duration above zero")]
    ZeroDuration(&'static str),
    /// The system refused something that every client needs.
    #[error("cannot start the keeper thread: {0}")]
    Thread(String),
}

/// Options that have been checked.
#[derive(Clone, Debug)]
pub(crate) struct Checked {
    pub(crate) options: ClientOptions,
    pub(crate) name: EngineName,
    pub(crate) payload_words: u32,
    pub(crate) spin: Duration,
}

/// The timeouts that may be zero: then a caller that shuts down, or flushes, waits for nothing but copies that run.
const MAY_BE_ZERO: [&str; 2] = ["drain_timeout", "flush_timeout"];

impl ClientOptions {
    /// Every timeout with its name, for programs that read options by name: the Python package takes each in
    /// milliseconds, under its name with `_ms` behind it.
    pub fn timeouts(&mut self) -> [(&'static str, &mut Duration); 6] {
        [
            ("attach_timeout", &mut self.attach_timeout),
            ("register_timeout", &mut self.register_timeout),
            ("operation_timeout", &mut self.operation_timeout),
            ("drain_timeout", &mut self.drain_timeout),
            ("flush_timeout", &mut self.flush_timeout),
            ("stall_after", &mut self.stall_after),
        ]
    }

    pub(crate) fn check(mut self) -> Result<Checked, ConfigError> {
        let name = EngineName::new(&self.engine)?;
        let (min, max) = (PAYLOAD_WORDS_MIN as usize * 8, PAYLOAD_WORDS_MAX as usize * 8);
        if !(min..=max).contains(&self.payload_bytes) {
            return Err(ConfigError::PayloadBytes { min, max, got: self.payload_bytes });
        }
        let backoffs = [("backoff_min", self.backoff_min), ("backoff_max", self.backoff_max)];
        let timeouts = self.timeouts().map(|(what, value)| (what, *value));
        for (what, value) in timeouts.into_iter().chain(backoffs) {
            if value.is_zero() && !MAY_BE_ZERO.contains(&what) {
                return Err(ConfigError::ZeroDuration(what));
            }
        }
        let default_spin = if usable_cpus() > 1 { Duration::from_micros(20) } else { Duration::ZERO };
        Ok(Checked {
            name,
            payload_words: (self.payload_bytes / 8) as u32,
            spin: self.spin.unwrap_or(default_spin),
            options: self,
        })
    }
}

/// The time `timeout` from now, or a century from now if that overflows: timeouts come from callers.
pub(crate) fn until(timeout: Duration) -> Instant {
    let now = Instant::now();
    now.checked_add(timeout).unwrap_or(now + FAR)
}

const FAR: Duration = Duration::from_secs(100 * 365 * 86_400);

/// The number of CPUs that this thread may run on; 1 if the system does not say, which only turns spinning off.
pub(crate) fn usable_cpus() -> usize {
    let mask = nix::sched::sched_getaffinity(nix::unistd::Pid::from_raw(0));
    mask.map_or(1, |mask| {
        (0..nix::sched::CpuSet::count()).filter(|cpu| mask.is_set(*cpu).unwrap_or(false)).count()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_time_is_too_long_to_wait_for() {
        assert!(until(Duration::MAX) > Instant::now() + Duration::from_secs(1 << 30));
        let name = format!("t-until-{}", std::process::id());
        let client = crate::Client::new(
            crate::Role::Scheduler,
            ClientOptions { engine: name, ..ClientOptions::default() },
        )
        .unwrap();
        client.shutdown();
        assert_eq!(client.wait_ready(Duration::MAX), Err(crate::Health::ShutDown), "no panic");
    }

    #[test]
    fn wrong_options_are_errors_that_name_them() {
        assert!(ClientOptions::default().check().is_ok());
        let with = |change: fn(&mut ClientOptions)| {
            let mut options = ClientOptions::default();
            change(&mut options);
            options.check().err()
        };
        assert!(matches!(with(|o| o.engine = "a/b".into()), Some(ConfigError::Name(_))));
        assert!(matches!(with(|o| o.payload_bytes = 1), Some(ConfigError::PayloadBytes { got: 1, .. })));
        assert_eq!(with(|o| o.stall_after = Duration::ZERO), Some(ConfigError::ZeroDuration("stall_after")));
    }
}
