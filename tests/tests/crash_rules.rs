//! The rules because of which a crash does no harm: with each of them broken the same checks find a violation.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "test code: a panic is how a test fails")]

use kvring_shm_abi::failpoint::Rule;
use kvring_tests::crash::{BREAK, copies, rules};
use kvring_tests::isolate::isolated_by;

/// Rules whose controls are elsewhere.
const ELSEWHERE: [Rule; 8] = [
    // Rules of what stands in for robust lists: their controls are in `standins.rs`.
    Rule::LifeLock,
    Rule::LooksAtLocks,
    // On x86 nothing can show that it is missing: the client has let its link's lock go, by an exchange, which is such a fence,
    // too. Its control needs a model.
    Rule::FenceAfterAHold,
    // Its control is in `lingering.rs`.
    Rule::MarkBeforeBurying,
    // Broken to bring about a rare state: in `hostile_claims.rs`, in `registration.rs` and `turns.rs`, and in `start_errors.rs`.
    Rule::ResetTheWord,
    Rule::BeginAtOnce,
    Rule::Memory,
    Rule::MemoryForTables,
];

/// For each rule: a scenario without violations, and the violation that it has where the rule does not hold.
macro_rules! controls {
    ($($holds:ident $broken:ident: $rule:ident, $scenario:path, $sign:literal;)+) => {
        $(
            #[test]
            fn $holds() {
                assert_eq!($scenario(), Vec::<String>::new());
            }

            #[test]
            fn $broken() {
                let rule = format!("{BREAK}={}", Rule::$rule);
                // In all processes of the scenario, this one included.
                isolated_by(stringify!($broken), &["env", &rule], || {
                    let violations = $scenario();
                    assert!(
                        violations.iter().any(|violation| violation.contains($sign)),
                        "no violation that says {:?}: {violations:#?}",
                        $sign
                    );
                });
            }
        )+

        #[test]
        fn every_rule_has_a_control() {
            let ours = [$(Rule::$rule),+];
            let has_none = |rule: &&Rule| !ours.contains(rule) && !ELSEWHERE.contains(rule);
            let missing: Vec<&Rule> = Rule::ALL.iter().filter(has_none).collect();
            assert!(missing.is_empty(), "without a control: {missing:?}");
        }
    };
}

controls! {
    the_word_of_a_header_comes_last without_the_word_last:
        WordLast, rules::a_header_half_written, "acknowledged";
    a_load_is_checked_against_its_generation without_generations:
        Generation, copies::a_copy_out_of_the_arena, "wrong bytes that were called right";
    a_load_is_checked_against_its_arena without_arena_ids:
        ArenaId, rules::handles_of_another_arena, "wrong bytes that were called right";
    a_recovery_combines_no_rounds without_rounds_in_a_recovery:
        Rounds, rules::shards_of_two_rounds_at_a_restart, "wrong bytes that were called right";
    a_reservation_combines_no_rounds without_rounds_in_a_reservation:
        RoundsInAReservation, rules::a_round_that_failed, "wrong bytes that were called right";
    a_region_is_its_operations_until_it_is_drained without_regions_until_drained:
        RegionsUntilDrained, rules::a_hold_behind_one_that_was_not_read, "loads of what is held";
    an_entry_is_free_after_all_of_it_was_reclaimed without_reclaiming_before_the_reset:
        ReclaimBeforeReset, rules::a_newcomer_during_a_reclaim, "a newcomer that is attached";
    a_successor_is_odd_before_it_looks_alive without_odd_before_the_words:
        OddBeforeTheWords, rules::a_client_that_wakes_up_during_a_recovery, "passes for a healthy one";
    what_a_living_client_writes_is_in_quarantine without_quarantine:
        Quarantine, copies::a_copy_into_the_arena, "wrong bytes of somebody else's";
    claims_for_an_earlier_engine_are_not_judged without_outdated_claims:
        OutdatedClaims, rules::an_entry_that_was_meant_for_an_earlier_engine, "refusals of a client";
    a_grant_of_an_earlier_engine_is_refused without_refusing_late_grants:
        LateGrants, copies::a_grant_that_comes_too_late, "wrong bytes of somebody else's";
    what_devices_write_waits_for_the_process without_waiting_for_the_process:
        WaitsForTheProcess, rules::a_keeper_that_ends_before_its_process, "given away while a device may write";
    running_copies_are_declared without_declaring_running_copies:
        DeclareRunningCopies, copies::a_copy_into_the_arena, "wrong bytes of somebody else's";
}
