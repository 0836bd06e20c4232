//! Which way the calibration chooses, and what it costs.

use crate::inside;
use crate::support::pages::Shape;
use crate::support::world::*;
use kvring_gpu_kernels::{CopyBackend, CopyMode};

#[test]
fn a_calibration_touches_nobody_s_pages() {
    inside(&[("FAKE_CUDA_DELAY_US", "0")], |fake| {
        let mut rng = Random::new(31, 0);
        let arena = Arena::new(1 << 20);
        let backend = backend(CopyMode::Auto);
        let _mapped = backend.map_arena(arena.mapping());
        for _ in 0..4 {
            let cache = Cache::random(&mut rng, Shape::SMALL);
            let (image, shared) = (cache.renew(&mut rng), arena.all.renew(&mut rng));
            let (before, launches) = (fake.counts(), fake.calls("cuLaunchKernel"));
            backend.prepare(&cache.paged).unwrap();
            assert!(cache.read() == image && arena.all.read() == shared, "{}", cache.describe());
            assert!(fake.calls("cuLaunchKernel") > launches, "nothing was measured");
            let chosen = backend.describe(&cache.paged);
            let named = |part: &str| CopyMode::ALL.iter().any(|mode| part.starts_with(mode.as_str()));
            let (store, load) = chosen.split_once("; loads by ").unwrap();
            assert!(named(store.strip_prefix("stores by ").unwrap()) && named(load), "{chosen}");
            // A cache is measured only once.
            let launches = fake.calls("cuLaunchKernel");
            backend.prepare(&cache.paged).unwrap();
            assert_eq!(fake.calls("cuLaunchKernel"), launches);
            // Scratch memory is given back; staging buffers, the cache's table and that of the one before stay.
            assert!(fake.counts().allocations <= before.allocations + 7);
            assert_eq!(fake.counts().modules, before.modules);
        }
    });
}

/// On a device on which everything takes long, a calibration stops at its budget, and goes by the rule where it has measured
/// nothing.
#[test]
fn a_calibration_ends_on_a_slow_device() {
    inside(&[("FAKE_CUDA_DELAY_US", "60000")], |fake| {
        let backend = backend(CopyMode::Auto);
        // By the rule short pages go through staging buffers, and long ones by themselves.
        for (page, way) in [(1024, "staged"), (128 << 10, "batch")] {
            let cache = Cache::plain(2, page, 4, 2);
            let records = fake.calls("cuEventRecord");
            backend.prepare(&cache.paged).unwrap();
            // A batch takes more than the budget, and ends with an event on each of its lanes.
            let batches = fake.calls("cuEventRecord") - records;
            assert!(batches <= 12, "{batches}");
            let chosen = backend.describe(&cache.paged);
            assert!(chosen.contains(&format!("loads by {way}")), "{chosen}");
            assert!(chosen.starts_with(&format!("stores by {way}")), "{chosen}");
        }
    });
}

#[test]
fn forced_modes_measure_nothing() {
    inside(&[], |fake| {
        let cache = Cache::plain(2, 1024, 4, 2);
        for mode in FORCED {
            let backend = backend(mode);
            let copies = || (fake.calls("cuLaunchKernel"), fake.calls("cuMemcpyBatchAsync"));
            let before = copies();
            backend.prepare(&cache.paged).unwrap();
            assert_eq!(copies(), before);
            assert_eq!(backend.describe(&cache.paged), format!("stores by {mode}; loads by {mode}"));
        }
        // Without memory to pin it goes by the rule.
        fake.fail("cuMemHostAlloc", 2, 1);
        let backend = backend(CopyMode::Auto);
        backend.prepare(&cache.paged).unwrap();
        assert_eq!(backend.describe(&cache.paged), "stores by staged; loads by staged");
    });
}
