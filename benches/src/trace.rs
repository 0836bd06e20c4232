//! Request traces in Mooncake's format: JSON lines, one request each, in the order of arrival.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::Path;

use anyhow::{Context, Result, bail};
use serde::Deserialize;

/// Tokens in a block of the Mooncake traces. The format does not carry it; its description does.
pub(crate) const BLOCK_TOKENS: u32 = 512;

/// The first 1000 requests of Mooncake's conversation trace: see `data/README.md`.
const BUNDLED: &str = include_str!("../data/mooncake_conversation_head.jsonl");
const BUNDLED_NAME: &str = "mooncake_conversation_head.jsonl (bundled)";

/// The form of a line, for errors.
const EXPECTED: &str = r#"expected {"timestamp": ms, "input_length": tokens, "output_length": tokens, "hash_ids": [one per 512 tokens]}"#;

/// The requests that an LLM service saw.
#[derive(Clone, Debug)]
pub(crate) struct Trace {
    /// Where it came from, for people.
    pub(crate) name: String,
    /// The requests, in the order of arrival.
    pub(crate) requests: Vec<TraceRequest>,
    /// Tokens in each block; a prompt's last block may hold fewer.
    pub(crate) block_tokens: u32,
}

/// One request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct TraceRequest {
    /// Milliseconds from the start of the trace.
    pub(crate) timestamp_ms: u64,
    /// Tokens in the prompt.
    pub(crate) input_tokens: u32,
    /// Tokens in the answer.
    pub(crate) output_tokens: u32,
    /// One id per block of the prompt. Equal ids are equal blocks with equal prefixes.
    pub(crate) blocks: Vec<u64>,
}

/// A line as it is in the file.
#[derive(Deserialize)]
struct Line {
    timestamp: u64,
    input_length: u32,
    output_length: u32,
    hash_ids: Vec<u64>,
}

impl Trace {
    /// The slice that is compiled in.
    pub(crate) fn bundled() -> Result<Self> {
        Self::parse(BUNDLED_NAME, BUNDLED.as_bytes())
    }

    /// Reads a trace from a file.
    pub(crate) fn read(path: &Path) -> Result<Self> {
        let name = path.display().to_string();
        let file = File::open(path).with_context(|| format!("cannot open trace {name}"))?;
        Self::parse(&name, BufReader::new(file))
    }

    /// Reads the file at `path`, or the bundled slice where there is none.
    pub(crate) fn read_or_bundled(path: Option<&Path>) -> Result<Self> {
        path.map_or_else(Self::bundled, Self::read)
    }

    /// How many different blocks there are: the chunks that an infinite cache would hold at the end.
    pub(crate) fn distinct_blocks(&self) -> usize {
        let mut blocks: Vec<u64> =
            self.requests.iter().flat_map(|request| &request.blocks).copied().collect();
        blocks.sort_unstable();
        blocks.dedup();
        blocks.len()
    }

    /// Tokens in all prompts.
    pub(crate) fn input_tokens(&self) -> u64 {
        self.requests.iter().map(|request| u64::from(request.input_tokens)).sum()
    }

    fn parse(name: &str, lines: impl BufRead) -> Result<Self> {
        let mut requests = Vec::new();
        for (index, line) in lines.lines().enumerate() {
            let line = line.with_context(|| format!("{name}:{}: cannot read the line", index + 1))?;
            if line.trim().is_empty() {
                continue;
            }
            requests.push(parse_line(&line).with_context(|| format!("{name}:{}: {EXPECTED}", index + 1))?);
        }
        if requests.is_empty() {
            bail!("{name}: no request in it: {EXPECTED} on each line");
        }
        Ok(Self { name: name.to_owned(), requests, block_tokens: BLOCK_TOKENS })
    }
}

fn parse_line(line: &str) -> Result<TraceRequest> {
    let Line { timestamp, input_length, output_length, hash_ids } = serde_json::from_str(line)?;
    let blocks_expected = input_length.div_ceil(BLOCK_TOKENS) as usize;
    if hash_ids.len() != blocks_expected {
        let came = hash_ids.len();
        bail!(
            "input_length {input_length} is {blocks_expected} blocks of {BLOCK_TOKENS} tokens, but hash_ids has {came}"
        );
    }
    Ok(TraceRequest {
        timestamp_ms: timestamp,
        input_tokens: input_length,
        output_tokens: output_length,
        blocks: hash_ids,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = r#"{"timestamp": 7, "input_length": 1025, "output_length": 3, "hash_ids": [0, 5, 9]}"#;

    fn error_of(text: &str) -> String {
        format!("{:#}", Trace::parse("some.jsonl", text.as_bytes()).unwrap_err())
    }

    #[test]
    fn a_line_becomes_a_request() {
        let trace = Trace::parse("some.jsonl", format!("{GOOD}\n\n{GOOD}\n").as_bytes()).unwrap();
        let request =
            TraceRequest { timestamp_ms: 7, input_tokens: 1025, output_tokens: 3, blocks: vec![0, 5, 9] };
        assert_eq!(trace.requests, [request.clone(), request]);
        assert_eq!((trace.distinct_blocks(), trace.input_tokens(), trace.block_tokens), (3, 2050, 512));
    }

    #[test]
    fn the_bundled_slice_is_the_head_of_the_trace() {
        let trace = Trace::bundled().unwrap();
        assert_eq!(trace.requests.len(), 1000);
        assert_eq!((trace.requests[0].input_tokens, trace.requests[0].blocks.len()), (6758, 14));
        assert!(trace.requests.is_sorted_by_key(|request| request.timestamp_ms));
    }

    #[test]
    fn wrong_lines_name_file_line_and_what_was_expected() {
        for wrong in [
            "not json",
            "[]",
            r#"{"timestamp": 7, "input_length": 1025, "output_length": 3}"#,
            r#"{"timestamp": 7, "input_length": -1, "output_length": 3, "hash_ids": []}"#,
            r#"{"timestamp": 7, "input_length": 1025, "output_length": 3, "hash_ids": [0, 5]}"#,
        ] {
            let error = error_of(&format!("{GOOD}\n{wrong}\n"));
            assert!(error.starts_with(r#"some.jsonl:2: expected {"timestamp": ms"#), "{error}");
        }
        let error =
            error_of(r#"{"timestamp": 7, "input_length": 1025, "output_length": 3, "hash_ids": [0, 5]}"#);
        assert!(error.contains("1025 is 3 blocks of 512 tokens, but hash_ids has 2"), "{error}");
    }

    #[test]
    fn an_empty_trace_and_a_missing_file_are_errors() {
        assert!(error_of("\n").contains("no request in it"));
        let error = format!("{:#}", Trace::read(Path::new("/nonexistent/t.jsonl")).unwrap_err());
        assert!(error.starts_with("cannot open trace /nonexistent/t.jsonl: "), "{error}");
    }
}
