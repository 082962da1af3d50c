//! Log lines on stderr; stdout is for results.

use std::io::IsTerminal;

use change::Refusal;
use tracing_subscriber::EnvFilter;

use crate::cli::LogFormat;

/// Libraries whose own lines say nothing to an operator below warnings.
const QUIET: &str =
    "sqlparser=warn,rustls=warn,tantivy=warn,hyper=warn,tokio_postgres=warn,librdkafka=warn,rdkafka=warn";

/// Starts logging; once per process.
pub(crate) fn start(format: LogFormat, level: &str) -> Result<(), Refusal> {
    let filter = EnvFilter::try_new(format!("{QUIET},{level}")).map_err(|error| {
        let remedy = "error, warn, info, debug, trace, or directives as in info,kafka=debug";
        Refusal::new(format!("`{level}` is not a log level: {error}"), remedy)
    })?;
    let lines = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    let lines = lines.with_ansi(std::io::stderr().is_terminal());
    match format {
        LogFormat::Human => lines.with_target(false).init(),
        LogFormat::Json => lines.json().flatten_event(true).init(),
    }
    Ok(())
}
