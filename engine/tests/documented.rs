//! The tables in `docs/` say what is so: each setting is there with its default, and each counter that they name exists.
#![allow(clippy::unwrap_used, reason = "a test")]

use kvring_engine::config::EngineConfig;
use kvring_engine::stats::Stat;
use std::collections::BTreeMap;

/// The first two cells of each row of the table below a heading, without backticks.
fn table(page: &str, heading: &str) -> Vec<(String, String)> {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs").join(page);
    let text = std::fs::read_to_string(path).unwrap();
    let below = text.split_once(heading).unwrap().1.lines();
    let rows = below.skip_while(|line| !line.starts_with('|')).take_while(|line| line.starts_with('|'));
    let rows = rows.skip(2).map(|row| {
        let mut cells = row.split('|').skip(1).map(|cell| cell.trim().trim_matches('`').to_owned());
        (cells.next().unwrap(), cells.next().unwrap())
    });
    rows.collect()
}

#[test]
fn each_setting_is_documented_with_its_default() {
    let config = serde_json::to_value(EngineConfig::default()).unwrap();
    let shown = |value: &serde_json::Value| match value {
        serde_json::Value::Null => String::new(),
        serde_json::Value::String(text) => text.clone(),
        value => value.to_string(),
    };
    let settings: BTreeMap<String, String> =
        config.as_object().unwrap().iter().map(|(key, value)| (key.clone(), shown(value))).collect();
    let documented = table("configuration.md", "\n## Settings of the engine\n");
    assert_eq!(BTreeMap::from_iter(documented), settings);
}

#[test]
fn the_counters_to_watch_exist() {
    let documented = table("operations.md", "\n### Counters to watch\n");
    assert!(documented.len() > 5, "{documented:?}");
    for (cell, _) in documented {
        // A cell may name several.
        for name in cell.split("` of `") {
            assert!(Stat::ALL.iter().any(|stat| stat.name() == name), "there is no counter `{name}`");
        }
    }
}
