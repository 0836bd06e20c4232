//! The status for people.

use super::{ClientStatus, EngineStatus, NamespaceStatus, State, Status};
use crate::console::{align_right, new_table};
use comfy_table::Table;
use kvring_engine::byte_size::ByteSize;
use kvring_engine::stats::{Kind, Snapshot, Stat};
use std::fmt::Write;

/// Everything, as text that ends with a line break.
pub(super) fn tables(status: &Status) -> String {
    let state = serde_json::to_value(status.state).ok();
    let state = state.as_ref().and_then(|state| state.as_str()).unwrap_or("unknown");
    let mut text = format!("engine `{}` is {state}: {}\n", status.name, status.detail);
    let mut add = |title: &str, table: Table| {
        // Writing to a string cannot fail.
        let _ = write!(text, "\n{title}\n{table}\n");
    };
    if let Some(engine) = &status.engine {
        add("engine", engine_table(engine, status.state));
    }
    if !status.clients.is_empty() {
        add("clients", clients_table(&status.clients));
    }
    if !status.namespaces.is_empty() {
        add("namespaces", namespaces_table(&status.namespaces));
    }
    if let Some(counters) = &status.counters {
        add("now", stats_table(counters, Kind::Gauge));
        add("since the start, where it is not 0", stats_table(counters, Kind::Counter));
    }
    text
}

fn human(bytes: u64) -> String {
    ByteSize(bytes).human()
}

/// `3 d 04:05:06`
fn duration(seconds: f64) -> String {
    let whole = seconds.max(0.0) as u64;
    let (days, rest) = (whole / 86_400, whole % 86_400);
    let clock = format!("{:02}:{:02}:{:02}", rest / 3600, rest % 3600 / 60, rest % 60);
    if days > 0 { format!("{days} d {clock}") } else { clock }
}

fn engine_table(engine: &EngineStatus, state: State) -> Table {
    let mut table = new_table();
    let since = if state == State::Dead { "started" } else { "up" };
    let up = match state {
        State::Dead => format!("{} ago", duration(engine.uptime_s)),
        _ => duration(engine.uptime_s),
    };
    for (name, value) in [
        ("pid", engine.pid.to_string()),
        (since, up),
        ("incarnation", engine.incarnation.to_string()),
        ("policy", engine.policy.clone()),
        ("arena", human(engine.arena_bytes)),
        ("allocated", human(engine.arena_bytes_allocated)),
        ("used", human(engine.arena_bytes_used)),
        ("slab", human(engine.slab_bytes)),
        ("arena id", engine.arena_id.clone()),
        ("death notice", engine.death_notice.to_owned()),
        ("waiting", engine.waiting.to_owned()),
    ] {
        table.add_row([name.to_owned(), value]);
    }
    table
}

fn clients_table(clients: &[ClientStatus]) -> Table {
    let mut table = new_table();
    table.set_header(["entry", "role", "name", "pid", "", "death notice", "waiting"]);
    for client in clients {
        let alive = match (client.alive, client.lingering) {
            (true, _) => "alive",
            (false, true) => "dying",
            (false, false) => "dead",
        };
        table.add_row([
            client.entry.to_string(),
            client.role.to_owned(),
            client.name.clone(),
            client.pid.to_string(),
            alive.to_owned(),
            client.death_notice.to_owned(),
            client.waiting.to_owned(),
        ]);
    }
    align_right(&mut table, &[0, 3]);
    table
}

fn namespaces_table(namespaces: &[NamespaceStatus]) -> Table {
    let mut table = new_table();
    table.set_header(["id", "model", "dtype", "ranks", "chunk tokens", "shard"]);
    for namespace in namespaces {
        let largest = namespace.shard_bytes.iter().max().copied().unwrap_or(0);
        table.add_row([
            namespace.id.to_string(),
            namespace.model.clone(),
            namespace.dtype.clone(),
            format!("{}/{}", namespace.ranks_registered, namespace.ranks),
            namespace.chunk_tokens.to_string(),
            human(largest),
        ]);
    }
    align_right(&mut table, &[0, 3, 4, 5]);
    table
}

fn stats_table(counters: &Snapshot, kind: Kind) -> Table {
    let mut table = new_table();
    // There are many counters, and most of them count things that should not happen.
    let shown =
        counters.iter().filter(|(stat, value)| stat.kind() == kind && (kind == Kind::Gauge || *value > 0));
    for (stat, value) in shown {
        let value = if is_bytes(stat) { human(value) } else { value.to_string() };
        table.add_row([stat.name().to_owned(), value, stat.help().to_owned()]);
    }
    align_right(&mut table, &[1]);
    table
}

fn is_bytes(stat: Stat) -> bool {
    stat.name().contains("bytes")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_readable() {
        assert_eq!(duration(0.4), "00:00:00");
        assert_eq!(duration(3_725.0), "01:02:05");
        assert_eq!(duration(86_400.0 * 3.0 + 60.0), "3 d 00:01:00");
    }

    #[test]
    fn a_clients_line_names_what_it_uses() {
        let client = ClientStatus {
            entry: 3,
            role: "worker",
            name: "vllm".to_owned(),
            pid: 17,
            alive: false,
            lingering: true,
            death_notice: "file lock",
            waiting: "slices",
        };
        let text = clients_table(&[client]).to_string();
        assert!(["dying", "file lock", "slices"].iter().all(|part| text.contains(part)), "{text}");
    }

    #[test]
    fn an_absent_engine_is_one_line() {
        let status = Status {
            name: "x".to_owned(),
            state: State::Absent,
            detail: "no engine named x runs here".to_owned(),
            engine: None,
            clients: Vec::new(),
            namespaces: Vec::new(),
            counters: None,
        };
        assert_eq!(tables(&status), "engine `x` is absent: no engine named x runs here\n");
    }
}
