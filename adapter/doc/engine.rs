// An expression for the examples in this crate's documentation: an engine on a thread of this process, and options for
// clients of it, which wait as long as a busy machine takes. rustdoc runs each example in a process of its own.
{
    let name = format!("doc-{}", std::process::id());
    let config = kvring_engine::config::EngineConfig {
        name: name.clone(),
        arena: Some("16MiB".parse()?),
        slab: Some("1MiB".parse()?),
        ..Default::default()
    };
    let patience = std::time::Duration::from_secs(3600);
    let options = kvring_adapter::ClientOptions {
        engine: name,
        attach_timeout: patience,
        register_timeout: patience,
        operation_timeout: patience,
        stall_after: patience,
        ..Default::default()
    };
    (kvring_engine::spawn(config)?, options)
}
