//! An address space without room for the tables. The limit holds for the whole process, so no other test belongs
//! into this file.

#![allow(clippy::unwrap_used, reason = "a test")]

mod cache_support;

use cache_support::VecTable;
use kvring_engine::cache::{Cache, CacheConfig, ConfigError};
use kvring_engine::policy::PolicyKind;
use nix::sys::resource::{Resource, getrlimit, setrlimit};

#[test]
fn tables_that_find_no_address_space_are_an_error_at_the_start() {
    let (_, hard) = getrlimit(Resource::RLIMIT_AS).unwrap();
    for policy in PolicyKind::ALL {
        // The arena has room for 2¹⁸ chunks. That takes between 16 and 60 MiB of tables, which are allocated one
        // after another.
        let limits =
            CacheConfig { leases_max: 1 << 10, pins_max: 1 << 12, ..CacheConfig::new(1 << 20, 1 << 10) };
        let config = CacheConfig { policy, ..limits };
        let (mut refused, mut made) = (0, 0);
        for mib in (0..120).step_by(4) {
            let table = VecTable::new(1 << 18);
            let status = std::fs::read_to_string("/proc/self/status").unwrap();
            let line = status.lines().find(|line| line.starts_with("VmSize:")).unwrap();
            let kib: u64 = line.split_whitespace().nth(1).unwrap().parse().unwrap();
            setrlimit(Resource::RLIMIT_AS, (kib << 10) + (mib << 20), hard).unwrap();
            let cache = Cache::new(config, table);
            setrlimit(Resource::RLIMIT_AS, hard, hard).unwrap();
            match cache {
                Ok(_) => made += 1,
                Err(error) => {
                    refused += 1;
                    assert!(matches!(error, ConfigError::Memory(_)), "{error}");
                    assert!(error.to_string().contains("ulimit -v"), "{error}");
                }
            }
        }
        assert!(refused > 2 && made > 2, "{policy}: refused {refused} times, made {made} times");
    }
}
