//! `kvring bench gpu`, with a stand-in for the CUDA driver and without any. What it measures there means nothing.

#![allow(clippy::unwrap_used, reason = "a test fails where it cannot go on")]

mod support;

use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::Command;
use support::{Said, kvring};

/// Small enough for a GPU of threads: the kernels' threads are fibers.
const SMALL: [&str; 10] = [
    "bench",
    "gpu",
    "--seconds",
    "0",
    "--working-set",
    "128KiB",
    "--chunks",
    "64KiB",
    "--fragments",
    "2KiB,64KiB",
];

/// The folder of the fake driver, built unless it is there.
fn fake() -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("fake-cuda");
    let build = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../gpu-kernels/tests/fake/build");
    let built = Command::new(build).arg(&folder).output().unwrap();
    assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
    folder
}

fn run(arguments: &[&str], env: &[(&str, &str)]) -> Said {
    let mut command = kvring(&[&SMALL[..], arguments].concat());
    Said::of(command.env("LD_LIBRARY_PATH", fake()).envs(env.iter().copied()).output().unwrap())
}

fn number(row: &Value, name: &str) -> f64 {
    row[name].as_f64().filter(|value| value.is_finite()).unwrap_or_else(|| panic!("{name} in {row}"))
}

#[test]
fn every_row_is_there_and_has_its_numbers() {
    let said = run(&["--json"], &[("FAKE_CUDA_REPORT", "1"), ("FAKE_CUDA_DELAY_US", "20")]);
    assert_eq!(said.code, Some(0), "{}", said.stderr);
    assert!(!said.stderr.contains("left"), "{}", said.stderr);
    let report = said.json();
    assert_eq!(
        (report["device"]["name"].as_str(), &report["device"]["cuda"]),
        (Some("Fake H100 0"), &"12.8".into())
    );
    let rows = report["rows"].as_array().unwrap();
    let mut expected = Vec::new();
    for backend in ["batch", "staged", "zerocopy", "auto"] {
        for (fragment, chunk) in [(2u64, 64u64), (64, 64)] {
            for direction in ["store", "load", "both"] {
                expected.push((direction, backend, fragment << 10, chunk << 10));
            }
        }
    }
    let found = |row: &Value| {
        let text = |name: &str| row[name].as_str().unwrap().to_owned();
        let count = |name: &str| row[name].as_u64().unwrap();
        (text("direction"), text("backend"), count("fragment_bytes"), count("chunk_bytes"))
    };
    let mut missing =
        rows.iter().map(found).zip(&expected).filter(|((direction, backend, fragment, chunk), other)| {
            (direction.as_str(), backend.as_str(), *fragment, *chunk) != **other
        });
    assert!(rows.len() == expected.len() && missing.next().is_none(), "{rows:#?}");
    for row in rows {
        for name in ["gbs", "gbs_p95", "ceiling_gbs", "ratio", "submit_us", "submit_us_p95"] {
            assert!(number(row, name) >= 0.0);
        }
        assert_eq!((row["sm_count"].as_u64(), row["turns"].as_u64()), (Some(16), Some(3)));
        let judged = row["backend"] == "staged" || row["backend"] == "auto" || row["fragment_bytes"] == 65536;
        assert_eq!(row["met"].is_boolean(), judged && row["backend"] != "zerocopy", "{row}");
        assert_eq!(row["decided"].is_string(), row["backend"] == "auto", "{row}");
    }
    let counts = ["gather", "latency"].map(|name| report[name].as_array().unwrap().len());
    assert_eq!(counts, [2 * 2, 4 * 2]);
    report["gather"].as_array().unwrap().iter().for_each(|row| assert!(number(row, "gbs") >= 0.0));
    report["latency"].as_array().unwrap().iter().for_each(|row| assert!(number(row, "us") > 0.0));
    assert!(number(&report["registration"], "seconds_per_gb") >= 0.0);
}

#[test]
fn people_get_a_table_with_goals() {
    let said = run(&["--backends", "batch"], &[("FAKE_CUDA_DELAY_US", "20")]);
    assert_eq!(said.code, Some(0), "{}", said.stderr);
    for text in
        ["gather alone", "registering", "ceiling", "≥ 0.95", "Fake H100 0", "not for quoting", "goals: "]
    {
        assert!(said.stdout.contains(text), "{text} in {}", said.stdout);
    }
}

#[test]
fn wrong_bytes_end_it() {
    for (backend, ignored, way) in [
        ("batch", "cuMemcpyHtoDAsync_v2", "store"),
        ("batch", "cuMemcpyBatchAsync", "load"),
        ("staged", "cuMemcpyDtoHAsync_v2", "load"),
        ("staged", "cuLaunchKernel", "load"),
        ("zerocopy", "cuLaunchKernel", "load"),
    ] {
        let said = run(&["--json", "--backends", backend], &[("FAKE_CUDA_IGNORE", ignored)]);
        let error = said.json()["error"].as_str().unwrap_or_default().to_owned();
        let right = error.starts_with(backend) && error.contains(&format!("wrong bytes after a {way}"));
        assert!(said.code == Some(1) && right, "{backend} without {ignored}: {error}");
    }
}

#[test]
fn without_a_driver_it_says_so() {
    let mut command = kvring(&["bench", "gpu", "--json"]);
    let said = Said::of(command.env_remove("LD_LIBRARY_PATH").output().unwrap());
    if said.code == Some(0) || !said.stderr.contains("no CUDA driver") {
        eprintln!("SKIPPED: there is a CUDA driver here: {}", said.stderr);
        return;
    }
    assert_eq!(said.code, Some(1));
    let error = said.json()["error"].as_str().unwrap().to_owned();
    assert!(error.starts_with("no CUDA driver here"), "{error}");
    assert_eq!(said.stderr.trim_end(), format!("error: {error}"));
}

#[test]
fn sizes_that_do_not_fit_are_named() {
    for (option, value) in [("--chunks", "48KiB"), ("--fragments", "3KiB"), ("--working-set", "100KiB")] {
        let mut command = kvring(&["bench", "gpu", option, value]);
        let said = Said::of(command.env("LD_LIBRARY_PATH", fake()).output().unwrap());
        assert!(said.code == Some(2) && said.stderr.contains(option), "{}", said.stderr);
    }
    let mut command = kvring(&["bench", "gpu", "--chunks", "2KiB", "--fragments", "4KiB,8KiB"]);
    let said = Said::of(command.env("LD_LIBRARY_PATH", fake()).output().unwrap());
    let expected = "error: --fragments: expected one that divides a chunk of 2KiB, got 4KiB, 8KiB\n";
    assert_eq!((said.code, said.stderr.as_str()), (Some(2), expected));
}
