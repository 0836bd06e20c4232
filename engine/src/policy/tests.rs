//! Tests of what every policy promises, and the random operations with which each policy is compared with its
//! model.

use proptest::prelude::*;

use super::*;

/// A random call, over ids and hashes below 32. A test skips calls that make no sense in the present state.
#[derive(Clone, Debug)]
pub(super) enum Op {
    Insert {
        id: ChunkId,
        hash: u64,
        parent: Option<ChunkId>,
    },
    InsertColdest {
        id: ChunkId,
        hash: u64,
    },
    Touch {
        id: ChunkId,
        front: Option<ChunkId>,
    },
    Remove {
        id: ChunkId,
        evicted: bool,
    },
    /// Bit n of `refused`: chunk n is in use.
    Victim {
        refused: u32,
    },
    PutBack {
        id: ChunkId,
    },
}

/// Up to 300 random calls.
pub(super) fn ops() -> impl Strategy<Value = Vec<Op>> {
    let id = 0..32_u32;
    let op = prop_oneof![
        4 => (id.clone(), 0..32_u64, proptest::option::of(id.clone()))
            .prop_map(|(id, hash, parent)| Op::Insert { id, hash, parent }),
        1 => (id.clone(), 0..32_u64).prop_map(|(id, hash)| Op::InsertColdest { id, hash }),
        2 => (id.clone(), proptest::option::of(id.clone())).prop_map(|(id, front)| Op::Touch { id, front }),
        1 => id.clone().prop_map(|id| Op::PutBack { id }),
        2 => (id, any::<bool>()).prop_map(|(id, evicted)| Op::Remove { id, evicted }),
        1 => (any::<u32>(), any::<u32>()).prop_map(|(a, b)| Op::Victim { refused: a & b }),
        1 => Just(Op::Victim { refused: u32::MAX }),
    ];
    proptest::collection::vec(op, 1..300)
}

fn policies(max_chunks: usize) -> impl Iterator<Item = Box<dyn Policy>> {
    PolicyKind::ALL.into_iter().map(move |kind| build(kind, max_chunks).unwrap())
}

#[test]
fn names_are_parsed_printed_and_serialised_alike() {
    for kind in PolicyKind::ALL {
        assert_eq!(kind.to_string().parse(), Ok(kind));
        assert_eq!(build(kind, 1).unwrap().name(), kind.name());
        let toml = toml::to_string(&std::collections::BTreeMap::from([("policy", kind)])).unwrap();
        assert_eq!(toml.trim(), format!("policy = \"{kind}\""));
    }
    let error = "fifo".parse::<PolicyKind>().unwrap_err();
    assert_eq!(error.to_string(), "unknown eviction policy \"fifo\": expected lru or arc");
    for kind in PolicyKind::ALL {
        assert!(error.to_string().contains(kind.name()), "the error names {kind}");
    }
}

#[test]
fn a_chain_goes_leaf_first_however_it_was_stored_and_used() {
    for mut policy in policies(8) {
        policy.insert(3, 0, 100, None);
        policy.insert(3, 1, 101, Some(0));
        policy.insert(3, 2, 102, Some(1));
        assert_eq!(policy.dump(3), [2, 1, 0], "{}: stored", policy.name());
        policy.insert(3, 3, 103, None);
        for (id, front) in [(0, None), (1, Some(0)), (2, Some(1))] {
            policy.touch(id, front);
        }
        assert_eq!(policy.dump(3), [3, 2, 1, 0], "{}: touched from its head on", policy.name());
        policy.touch(2, None);
        policy.touch(1, Some(1));
        assert_eq!(policy.dump(3), [3, 1, 0, 2], "{}: touched alone", policy.name());
        policy.remove(3, false);
        for id in [2, 1, 0] {
            policy.touch(id, None);
        }
        assert_eq!(policy.dump(3), [2, 1, 0], "{}: touched tail-first", policy.name());
        for expected in [2, 1, 0] {
            let id = policy.victim(3, &mut u32::MAX.clone(), &mut |_| true).unwrap();
            assert_eq!(id, expected, "{}", policy.name());
            policy.remove(id, true);
        }
        assert!(policy.is_empty(3));
    }
}

/// Chunks of an earlier engine get their places from the warmest one on, while some of them are used already and new
/// ones are stored.
#[test]
fn what_is_inserted_as_the_coldest_comes_before_all_others() {
    for mut policy in policies(8) {
        policy.insert(3, 0, 100, None);
        policy.insert_coldest(3, 1, 101);
        policy.insert_coldest(4, 7, 107);
        policy.insert_coldest(3, 2, 102);
        policy.touch(2, None);
        policy.insert(3, 3, 103, Some(1));
        policy.insert_coldest(3, 4, 104);
        assert_eq!(policy.dump(3), [4, 3, 1, 0, 2], "{}", policy.name());
        assert!((0..5).all(|id| policy.has(id)) && !policy.has(5) && !policy.has(8), "{}", policy.name());
        for expected in [4, 3, 1, 0, 2] {
            let id = policy.victim(3, &mut u32::MAX.clone(), &mut |_| true).unwrap();
            assert_eq!(id, expected, "{}", policy.name());
            policy.remove(id, true);
        }
        assert_eq!(policy.dump(4), [7], "{}", policy.name());
    }
}

#[test]
fn a_search_for_a_victim_looks_at_each_chunk_once() {
    for mut policy in policies(100) {
        for id in 0..100 {
            policy.insert(3, id, u64::from(id), None);
        }
        // This gives arc chunks on both of its lists.
        (0..40).for_each(|id| policy.touch(id, None));
        let mut seen = Vec::new();
        let found = policy.victim(3, &mut u32::MAX.clone(), &mut |id| {
            seen.push(id);
            false
        });
        seen.sort_unstable();
        assert_eq!(found, None, "{}", policy.name());
        assert!(seen.iter().copied().eq(0..100), "{}: {seen:?}", policy.name());
        assert_eq!(policy.len(3), 100);
    }
}

#[test]
fn a_search_goes_on_where_its_looks_were_at_an_end() {
    for mut policy in policies(100) {
        for id in 0..100 {
            policy.insert(3, id, u64::from(id), None);
        }
        let mut seen = Vec::new();
        for _ in 0..10 {
            let mut looks = 10;
            let found = policy.victim(3, &mut looks, &mut |id| {
                seen.push(id);
                false
            });
            assert_eq!((found, looks), (None, 0), "{}", policy.name());
        }
        assert!(seen.iter().copied().eq(0..100), "{}: {seen:?}", policy.name());
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    /// Whatever is leased, and however few looks each call has: a search that goes on call by call finds an
    /// evictable chunk if there is one, and says that there is none only if there is none.
    #[test]
    fn a_search_in_pieces_finds_a_victim_if_there_is_one(
        ops in ops(),
        allowances in proptest::collection::vec(1..12_u32, 1..8),
        kind in proptest::sample::select(&PolicyKind::ALL[..]),
    ) {
        let mut policy = build(kind, 32).unwrap();
        let mut resident = 0_u32;
        let mut allowances = allowances.iter().copied().cycle();
        for op in ops {
            let is_resident = |id: ChunkId| resident >> id & 1 == 1;
            match op {
                Op::Insert { id, hash, parent } if !is_resident(id) => {
                    policy.insert(3, id, hash, parent);
                    resident |= 1 << id;
                }
                Op::InsertColdest { id, hash } if !is_resident(id) => {
                    policy.insert_coldest(3, id, hash);
                    resident |= 1 << id;
                }
                Op::Touch { id, front } if is_resident(id) => policy.touch(id, front),
                Op::Remove { id, evicted } if is_resident(id) => {
                    policy.remove(id, evicted);
                    resident &= !(1 << id);
                }
                Op::Victim { refused } => {
                    // Either some chunks are leased, or all but one.
                    let refused = if refused % 2 == 0 { refused } else { !(1 << (refused >> 27)) };
                    let (may_go, all) = (resident & !refused, resident.count_ones());
                    let (mut found, mut looked) = (None, 0);
                    while found.is_none() && looked < 2 * all {
                        let allowed = allowances.next().unwrap();
                        let mut looks = allowed;
                        found = policy.victim(3, &mut looks, &mut |id| refused >> id & 1 == 0);
                        looked += allowed - looks;
                        if found.is_none() && looks > 0 {
                            prop_assert_eq!(may_go, 0, "{}: it says that none may go", kind);
                            break;
                        }
                    }
                    prop_assert_eq!(found.is_some(), may_go != 0, "{} after {} looks", kind, looked);
                    prop_assert!(found.is_none_or(|id| may_go >> id & 1 == 1));
                }
                _ => {}
            }
        }
    }
}

#[test]
fn a_search_goes_on_with_another_list_where_all_of_one_is_in_use() {
    for mut policy in policies(400) {
        for id in 0..400 {
            policy.insert(3, id, u64::from(id), None);
        }
        // With arc, these chunks are on another list than the rest, on the one that is searched first.
        (0..200).for_each(|id| policy.touch(id, None));
        let mut looked = 0;
        for leased in [0..200, 200..400] {
            for _ in 0..100 {
                let found = (0..50).find_map(|_| {
                    let mut looks = 16;
                    let found = policy.victim(3, &mut looks, &mut |id| !leased.contains(&id));
                    looked += 16 - looks;
                    found
                });
                assert!(found.is_some_and(|id| !leased.contains(&id)), "{}", policy.name());
                policy.remove(found.unwrap(), true);
            }
        }
        assert!(looked <= 400 + 200 * 17, "{}: {looked} looks for 200 victims", policy.name());
    }
}

#[test]
fn orders_are_kept_apart() {
    for mut policy in policies(8) {
        for id in 0..8 {
            policy.insert(id as usize % 2, id, u64::from(id), None);
        }
        policy.touch(0, Some(1));
        assert_eq!((policy.dump(0), policy.len(1)), (vec![2, 4, 6, 0], 4), "{}", policy.name());
        let victim = policy.victim(1, &mut u32::MAX.clone(), &mut |id| id > 1);
        assert_eq!(victim, Some(3), "{}", policy.name());
    }
}

#[test]
fn a_refused_chunk_is_not_met_again_soon() {
    for mut policy in policies(100) {
        for id in 0..100 {
            policy.insert(3, id, u64::from(id), None);
        }
        let mut looks = 0;
        for expected in 10..20 {
            let id = policy.victim(3, &mut u32::MAX.clone(), &mut |id| {
                looks += 1;
                id >= 10
            });
            assert_eq!(id, Some(expected), "{}", policy.name());
            policy.remove(expected, true);
        }
        assert_eq!(looks, 20, "{}: ten refusals, ten victims", policy.name());
    }
}

#[test]
fn memory_for_many_chunks_is_not_touched_until_used() {
    let resident_kib = || {
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse::<usize>().unwrap()
    };
    let before = resident_kib();
    let made: Vec<_> = policies(1 << 25).collect();
    let grown = resident_kib().saturating_sub(before);
    // If it were touched, it would be 3.4 GiB. The limit leaves room for the tests that run beside this one.
    assert!(grown < 1 << 20, "{grown} KiB for {} policies that hold nothing", made.len());
}

#[test]
fn a_call_in_the_wrong_state_stops_a_debug_build_and_harms_no_release_build() {
    for kind in PolicyKind::ALL {
        let wrong: [fn(&mut dyn Policy); 6] = [
            |p| p.touch(1, None),
            |p| p.remove(1, true),
            |p| p.insert(3, 0, 0, None),
            |p| p.insert(3, 4, 0, None),
            |p| p.insert_coldest(3, 0, 0),
            |p| p.insert_coldest(3, 4, 0),
        ];
        for call in wrong {
            let result = std::panic::catch_unwind(|| {
                let mut policy = build(kind, 4).unwrap();
                policy.insert(3, 0, 0, None);
                call(&mut *policy);
                policy.dump(3)
            });
            assert_eq!(result.is_err(), cfg!(debug_assertions), "{kind}");
            assert!(
                result.is_err() || result.is_ok_and(|dump| dump == [0]),
                "{kind}: the call was not ignored"
            );
        }
    }
}
