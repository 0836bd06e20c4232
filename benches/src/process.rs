//! The states of processes and threads, as the kernel shows them.

use anyhow::Context;

/// The state of the process or thread with this `stat` file: R running, S asleep, T stopped, Z dead and not waited for.
pub(crate) fn state(stat: &str) -> anyhow::Result<char> {
    let text = std::fs::read_to_string(stat).with_context(|| stat.to_owned())?;
    parse(&text).with_context(|| format!("{stat}: no state in {text:?}"))
}

/// The third field; the second is a name in brackets, which may contain anything.
fn parse(text: &str) -> Option<char> {
    text.rsplit_once(") ")?.1.chars().next()
}

#[cfg(test)]
mod tests {
    use super::parse;

    #[test]
    fn a_name_with_brackets_does_not_hide_the_state() {
        assert_eq!(parse("12 (kvring) S 1 12"), Some('S'));
        assert_eq!(parse("12 (a) R (b) T 1 12"), Some('T'));
        assert_eq!(parse("12"), None);
    }
}
