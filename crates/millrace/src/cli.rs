//! The command line: what `--help` shows is the manual.

use std::path::PathBuf;
use std::time::Duration;

use change::Lsn;
use clap::{Args, Parser, Subcommand, ValueEnum};
use postgres::plan::Table;

const ABOUT: &str = "\
Millrace carries the committed changes of a Postgres database to stores derived from it, exactly once and in
commit order: Postgres -> Kafka -> counters in Redis and a full-text index.

First steps:
  millrace check        is everything in place? each thing that is not, with its remedy
  millrace setup        make what the pipeline needs: slot, publication, topics
  millrace run          reader, counters and search in one process (or each as a process of its own)
  millrace status       how far each store has come
  millrace wait         block until the stores have what Postgres has committed so far
";

const AFTER: &str = "\
Configuration: millrace.toml, or the file that --config names. Every key can come from the environment: MILLRACE_
and the key in capitals, `__` between levels, as in MILLRACE_POSTGRES__URL; lists as a,b or as a TOML array. Every
string can come from a file: `url_file = \"/run/secrets/url\"`, or MILLRACE_POSTGRES__URL_FILE.

Exit codes:
  0  good
  1  different (verify), or timed out (wait)
  2  could not be done; trying again may help
  3  refused; what mends it was printed
  4  fenced repeatedly: another one of the same kind is running";

/// Change data capture from Postgres to derived stores, exactly once.
#[derive(Debug, Parser)]
#[command(name = "millrace", version, about, long_about = ABOUT, after_long_help = AFTER)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) global: Global,
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// What every command takes.
#[derive(Debug, Args)]
pub(crate) struct Global {
    /// The configuration file [default: millrace.toml].
    #[arg(long, global = true, value_name = "FILE", env = "MILLRACE_CONFIG")]
    config: Option<PathBuf>,
    /// How log lines on stderr look.
    #[arg(long, global = true, value_enum, default_value_t, env = "MILLRACE_LOG_FORMAT")]
    pub(crate) log_format: LogFormat,
    /// What is logged: error, warn, info, debug, trace, or directives as in `info,kafka=debug`.
    #[arg(long, global = true, value_name = "LEVEL", default_value = "info", env = "MILLRACE_LOG_LEVEL")]
    pub(crate) log_level: String,
}

impl Global {
    /// The file, and whether somebody asked for it.
    pub(crate) fn config(&self) -> (PathBuf, bool) {
        match &self.config {
            Some(path) => (path.clone(), true),
            None => ("millrace.toml".into(), false),
        }
    }
}

/// How log lines look.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, ValueEnum)]
pub(crate) enum LogFormat {
    /// For people.
    #[default]
    Human,
    /// One JSON object a line.
    Json,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Make what the pipeline needs: slot, publication, heartbeat table, topics.
    ///
    /// Checks every precondition first, as `millrace check` does, and changes nothing unless all of them hold.
    /// Can be run again at any time: it continues where a killed one stopped, adds tables that were added to the
    /// configuration, and takes out those that were removed from it. Rows that the tables have already are read by the
    /// reader, in rounds of short snapshots. Uses `postgres.admin_url` where that is given; the pipeline itself needs no more than
    /// the role of `postgres.url`, which may log in, replicate, and read the tables.
    ///
    /// A DBA who wants to do it by hand runs the SQL that --dry-run prints, but for the slot, which setup makes.
    #[command(after_help = "Examples:\n  millrace setup\n  millrace setup --dry-run > for-the-dba.sql")]
    Setup {
        /// Print the SQL and the topics instead of making them.
        #[arg(long)]
        dry_run: bool,
    },
    /// Show how far a table's rows are in the log, and bring in a table that was added to the configuration.
    ///
    /// Tells what it would do: how many rows and bytes there are to read, what is locked and for how long. With --yes the
    /// table enters the publication; the running reader takes note and reads its rows in rounds while all changes flow on.
    /// `millrace setup` does the same for every table of the configuration at once.
    #[command(
        after_help = "Examples:\n  millrace snapshot public.users\n  millrace snapshot public.users --yes"
    )]
    Snapshot {
        /// The table: schema.table, as in `postgres.tables`.
        table: String,
        /// Do it.
        #[arg(long)]
        yes: bool,
    },
    /// Check every precondition and print each that does not hold, with its remedy.
    ///
    /// Looks at Postgres, Kafka, Redis and the search directory, and changes nothing. Exits with 3 when
    /// something would keep the pipeline from running.
    Check {
        #[command(flatten)]
        format: Format,
    },
    /// Carry changes from Postgres to Kafka.
    ///
    /// One reader works at a time. While another one holds the slot this one stands by and takes over when that
    /// one ends. Ends in order on SIGTERM or Ctrl-C; a second signal ends it at once. Nothing is lost either
    /// way, nor by kill -9.
    Reader {
        /// Do not wait for the reader that holds the slot: fence it, end its session, and go on from the log.
        #[arg(long)]
        takeover: bool,
    },
    /// Keep the counters in Redis.
    Counters {
        #[command(flatten)]
        skip: Skip,
    },
    /// Keep the search indexes and serve them over HTTP.
    Search {
        #[command(flatten)]
        skip: Skip,
    },
    /// Run reader, counters and search in one process.
    ///
    /// Those that are configured. When one of them fails the others are stopped in order.
    Run {
        /// As for `millrace reader`.
        #[arg(long)]
        takeover: bool,
    },
    /// Show how far everything has come.
    ///
    /// From Postgres' head through the reader and the log to each store: LSNs, lag in bytes and seconds, and how
    /// much WAL the slot keeps the server from removing. What cannot be reached is shown as such.
    Status {
        #[command(flatten)]
        format: Format,
    },
    /// Block until the stores have what Postgres has committed so far.
    ///
    /// An application takes the LSN after its COMMIT (`SELECT pg_current_wal_insert_lsn()`) and waits for it:
    /// then the stores show its own write. Without --lsn the target is Postgres' current LSN.
    #[command(
        after_help = "Examples:\n  millrace wait\n  millrace wait --lsn 0/16B3748 --store counters.unread --timeout 5s"
    )]
    Wait {
        /// The LSN to wait for, as Postgres prints it.
        #[arg(long)]
        lsn: Option<Lsn>,
        /// A store: counters.NAME or search.NAME; may be given several times. Without: all of them.
        #[arg(long = "store", value_name = "STORE")]
        stores: Vec<String>,
        /// How long: 500ms, 30s, 5m.
        #[arg(long, default_value = "30s", value_parser = duration)]
        timeout: Duration,
        #[command(flatten)]
        format: Format,
    },
    /// Prove that the stores are equal to Postgres, while everything keeps running.
    ///
    /// Each difference is a defect. Exits with 1 when there is one, and with 2 when a store could not be compared.
    #[command(after_help = "Examples:\n  millrace verify\n  millrace verify --store counters.unread --json")]
    Verify {
        /// A store: counters.NAME or search.NAME; may be given several times. Without: all of them.
        #[arg(long = "store", value_name = "STORE")]
        stores: Vec<String>,
        /// How long to wait for the stores to come so far: 500ms, 30s, 5m.
        #[arg(long, default_value = "60s", value_parser = duration)]
        timeout: Duration,
        /// Print every difference; without, the first 20. JSON has them all.
        #[arg(long)]
        all: bool,
        #[command(flatten)]
        format: Format,
    },
    /// Build stores anew from the log's beginning, beside those that readers see.
    ///
    /// Records the request in the store and returns; the worker begins within seconds, or when it is started. The
    /// present store goes on being served and kept current until the new one has caught up and takes its place in one
    /// step. A rebuild survives every kill, and one that was asked for already goes on. The search indexes' request is
    /// a directory beside the index: run this on their host.
    #[command(
        after_help = "Examples:\n  millrace rebuild counters\n  millrace rebuild counters.unread search --wait"
    )]
    Rebuild {
        /// counters, search, counters.NAME, search.NAME, or NAME where only one store has it.
        #[arg(required = true, value_name = "STORE")]
        stores: Vec<String>,
        /// Show how far it is until the new store has taken the old one's place.
        #[arg(long)]
        wait: bool,
        #[command(flatten)]
        format: Format,
    },
    /// Leave a record of the log, or those of a row, out of a store that cannot take them in.
    ///
    /// A store that has stopped at a record (`millrace status` shows which, and why) goes on without it, within seconds or
    /// when its worker is started. The store's checkpoint records the offset for ever, and `millrace verify` shows what the
    /// store lacks by it. Nothing is left out that a store can take in.
    ///
    /// If columns of the row were omitted for its size (see [postgres.oversize]), a search index stores the row without them.
    #[command(
        after_help = "Examples:\n  millrace skip counters.unread --offset 41 --reason \"written by a broken script\"\n  millrace skip search.files --key 1207 --reason \"a scan of 90 MB\""
    )]
    Skip {
        /// counters.NAME, search.NAME, or NAME where only one store has it.
        store: String,
        #[command(flatten)]
        records: SkipRecords,
        /// Why, for whoever reads it later; kept with the request.
        #[arg(long, value_name = "TEXT")]
        reason: String,
    },
    /// Begin a complete new log beside the current one, and go over to it.
    #[command(subcommand)]
    Generation(GenerationCommand),
    /// Print the log as it flows.
    #[command(
        after_help = "Examples:\n  millrace tail --table public.emails\n  millrace tail --from-beginning --limit 10 --json | jq .value.op"
    )]
    Tail {
        /// Begin with the first record instead of the next one.
        #[arg(long)]
        from_beginning: bool,
        /// Only this table: schema.table, as in `postgres.tables`.
        #[arg(long)]
        table: Option<Table>,
        /// End after so many records.
        #[arg(long)]
        limit: Option<u64>,
        #[command(flatten)]
        format: Format,
    },
    /// Remove everything the pipeline made: slot, publication, topics, stores.
    ///
    /// Prints what will be removed and asks; the source's tables are never touched. Refused while a reader is
    /// running.
    Teardown {
        /// Do not ask.
        #[arg(long)]
        yes: bool,
    },
    /// A mailbox with live traffic to watch the pipeline with; `scripts/demo` runs it.
    #[command(hide = true)]
    Demo(crate::commands::demo::Options),
}

/// What to do about the pipeline's logs.
#[derive(Debug, Subcommand)]
pub(crate) enum GenerationCommand {
    /// Make a new log, from which every store is built anew and which then takes the current one's place.
    ///
    /// The remedy wherever a log cannot be complete any more: its slot was lost or dropped, its topics or their beginning
    /// are gone, the publication was changed by hand, the source was restored to an earlier point. The running reader fills
    /// the new log from a snapshot of the tables and all changes since; the workers build a copy of every store from it and
    /// swap each in when it has come as far as the one that readers see; then the new log is the current one, and the old
    /// one's slot is dropped. The old log goes on meanwhile, if it can. Everything survives every kill; a new log that was
    /// begun goes on.
    ///
    /// After a restore to an earlier point the stores show what the database no longer has: they are emptied at once.
    #[command(after_help = "Examples:\n  millrace generation new\n  millrace generation new --wait")]
    New {
        /// Begin another one even where one was begun already: that one is given up.
        #[arg(long)]
        again: bool,
        /// Show how far it is until the new log is the current one.
        #[arg(long)]
        wait: bool,
        #[command(flatten)]
        format: Format,
    },
    /// Remove the logs that are not current: their topics, and a slot where one is left.
    ///
    /// Shows which consumer groups stand there, and asks.
    Retire {
        /// Do not ask.
        #[arg(long)]
        yes: bool,
    },
}

/// Which records of the log are meant.
#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
pub(crate) struct SkipRecords {
    /// The record at this offset of the log that the store is built from.
    #[arg(long)]
    offset: Option<i64>,
    /// Every record of the row with this key, also those to come: the values of the key's columns, joined by `:`; `\` and `:` in
    /// a value have a `\` before them.
    #[arg(long)]
    key: Option<String>,
}

impl From<SkipRecords> for kafka::Records {
    fn from(given: SkipRecords) -> Self {
        match (given.offset, given.key) {
            (Some(offset), _) => kafka::Records::At(offset),
            (None, key) => kafka::Records::OfRow(key.unwrap_or_default()),
        }
    }
}

/// Records to leave out.
#[derive(Debug, Args)]
pub(crate) struct Skip {
    /// Leave this record of the log out of every store here that cannot take it in; may be given several times. The
    /// stores' checkpoints record it and `millrace status` shows it. `millrace skip` says the same to a running worker.
    #[arg(long = "skip-record", value_name = "OFFSET")]
    pub(crate) records: Vec<i64>,
}

/// For people or for programs.
#[derive(Clone, Copy, Debug, Args)]
pub(crate) struct Format {
    /// Print JSON, for programs.
    #[arg(long)]
    pub(crate) json: bool,
}

/// Reads `500ms`, `30s`, `5m`, `1h`; a bare number is seconds.
fn duration(text: &str) -> Result<Duration, String> {
    let digits = text.len() - text.trim_start_matches(|c: char| c.is_ascii_digit()).len();
    let number: Option<u64> = text[..digits].parse().ok();
    let unit_ms = match &text[digits..] {
        "ms" => Some(1),
        "" | "s" => Some(1_000),
        "m" => Some(60_000),
        "h" => Some(3_600_000),
        _ => None,
    };
    let milliseconds = number.zip(unit_ms).and_then(|(number, unit)| number.checked_mul(unit));
    milliseconds.map(Duration::from_millis).ok_or_else(|| "write it as in 500ms, 30s or 5m".into())
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_well_formed() {
        Cli::command().debug_assert();
    }

    #[test]
    fn durations_have_units() {
        let read = |text| duration(text).map(|d| d.as_millis());
        assert_eq!(
            ["500ms", "30s", "7", "5m", "1h"].map(|t| read(t).unwrap()),
            [500, 30_000, 7_000, 300_000, 3_600_000]
        );
        for text in ["", "s", "-1s", "1.5s", "3d", "99999999999999999999s", "9999999999999999h"] {
            assert!(read(text).is_err(), "{text}");
        }
    }
}
