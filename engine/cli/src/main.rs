//! The `kvring` command.
fn main() {}
