//! The configuration: `millrace.toml`, the environment over it, parsed once into the types that the commands use.
//!
//! Whatever is wrong is found here, all of it in one run, and each mistake names where it was written and what
//! to write instead. After this module nothing reads the environment and nothing parses a name again.

mod names;
mod section;
mod tree;

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use change::Refusal;
use postgres::plan::Table;
use redis_counters::sql::Definition;
use relay::Limits;
use tantivy_search::IndexDefinition;

pub(crate) use names::Pipeline;
use section::{Found, Mistakes, Section};

/// Text that is never printed.
#[derive(Clone, PartialEq, Eq, Default)]
pub(crate) struct Secret(String);

impl Secret {
    pub(crate) fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("<hidden>")
    }
}

/// Everything that is configured.
#[derive(Clone, Debug)]
pub(crate) struct Config {
    pub(crate) pipeline: Pipeline,
    pub(crate) postgres: PostgresConfig,
    pub(crate) kafka: KafkaConfig,
    pub(crate) redis: Option<RedisConfig>,
    pub(crate) counters: Vec<CounterConfig>,
    pub(crate) search: Option<SearchConfig>,
    pub(crate) reader: ReaderConfig,
    pub(crate) snapshot: SnapshotConfig,
    pub(crate) telemetry: TelemetryConfig,
}

/// `[postgres]`.
#[derive(Clone, Debug)]
pub(crate) struct PostgresConfig {
    /// Workers do without, so that their processes need not know it.
    url: Option<Secret>,
    admin_url: Option<Secret>,
    pub(crate) tables: Vec<Table>,
    /// Tables of which a row that is larger than a record may be is written without its largest columns.
    pub(crate) omit: BTreeSet<Table>,
}

impl PostgresConfig {
    /// For everything but DDL.
    pub(crate) fn url(&self) -> Result<&str, Refusal> {
        self.url.as_ref().map(Secret::expose).ok_or_else(|| {
            Refusal::new(
                "`postgres.url` is missing",
                "write `url = \"postgres://millrace@127.0.0.1:5432/app\"` under [postgres], or set MILLRACE_POSTGRES__URL",
            )
        })
    }

    /// For `setup` and `teardown`: `admin_url`, and `url` where that is not given.
    pub(crate) fn admin_url(&self) -> Result<&str, Refusal> {
        self.admin_url.as_ref().map_or_else(|| self.url(), |secret| Ok(secret.expose()))
    }
}

/// `[kafka]`.
#[derive(Clone, Debug)]
pub(crate) struct KafkaConfig {
    pub(crate) bootstrap: String,
    /// librdkafka's; passwords may be among them.
    pub(crate) properties: BTreeMap<String, Secret>,
    /// Of the topics that `setup` makes; `None`: the brokers' default.
    pub(crate) replication_factor: Option<u16>,
}

/// `[redis]`.
#[derive(Clone, Debug)]
pub(crate) struct RedisConfig {
    pub(crate) url: Secret,
    /// Before every key.
    pub(crate) prefix: String,
    /// Longest time that a script is meant to hold Redis for.
    pub(crate) longest_script: Duration,
}

/// Connections that read a snapshot at a time, where nothing is configured.
const SNAPSHOT_CONNECTIONS: usize = 2;
/// Size up to which a table without a key is read in one piece, likewise.
const KEYLESS_MB: u64 = 1024;

/// `[counters.NAME]`.
#[derive(Clone, Debug)]
pub(crate) struct CounterConfig {
    pub(crate) name: String,
    pub(crate) definition: Definition,
}

/// `[search]`.
#[derive(Clone, Debug)]
pub(crate) struct SearchConfig {
    pub(crate) directory: PathBuf,
    pub(crate) listen: SocketAddr,
    /// Longest time that an applied change stays invisible.
    pub(crate) commit_interval: Duration,
    /// Memory of each index's writer, bytes.
    pub(crate) heap: usize,
    pub(crate) indexes: Vec<IndexDefinition>,
}

/// `[reader]`: bounds of one Kafka transaction, and what to do about an idle source and an absent Kafka.
#[derive(Clone, Debug)]
pub(crate) struct ReaderConfig {
    pub(crate) limits: Limits,
    /// A log that cannot be written for this long: give up the slot, so that Postgres can shut down (h11).
    pub(crate) outage_limit: Duration,
}

/// `[snapshot]`: how tables are read that had rows before the pipeline, beside what is in [`Limits`].
#[derive(Clone, Debug)]
pub(crate) struct SnapshotConfig {
    /// Connections that read at a time.
    pub(crate) connections: usize,
    /// Size up to which a table without a key is read in one piece.
    pub(crate) keyless_bytes: u64,
}

/// `[telemetry.listen]`: where each process serves `/health` and `/metrics`.
#[derive(Clone, Debug)]
pub(crate) struct TelemetryConfig {
    pub(crate) reader: Option<SocketAddr>,
    pub(crate) counters: Option<SocketAddr>,
    pub(crate) search: Option<SocketAddr>,
}

impl Config {
    /// Reads the file and the environment. Where `path` was not asked for and is not there, the environment has
    /// to say everything.
    pub(crate) fn load(path: &Path, asked_for: bool) -> Result<Config, Vec<Refusal>> {
        let text = match std::fs::read_to_string(path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound && !asked_for => String::new(),
            Err(error) => {
                let what = format!("cannot read the configuration {}: {error}", path.display());
                return Err(vec![Refusal::new(what, "name the file with --config FILE")]);
            }
        };
        // A variable that is not UTF-8 cannot be one of ours with a meaning; its lossy form says so in a message.
        let environment = std::env::vars_os()
            .map(|(name, value)| (name.to_string_lossy().into_owned(), value.to_string_lossy().into_owned()));
        Config::parse(path, &text, environment)
    }

    fn parse(
        path: &Path,
        text: &str,
        environment: impl IntoIterator<Item = (String, String)>,
    ) -> Result<Config, Vec<Refusal>> {
        let root = tree::merge(path, text, environment).map_err(|refusal| vec![refusal])?;
        let mistakes = Mistakes::default();
        let config = read(Section::root(root, mistakes.clone()), &mistakes);
        match mistakes.take() {
            found if found.is_empty() => config.ok_or_else(Vec::new),
            found => Err(found),
        }
    }
}

/// Reads everything, so that all mistakes are found; `None` only where a mistake was.
fn read(mut root: Section, mistakes: &Mistakes) -> Option<Config> {
    let pipeline = pipeline(&mut root, mistakes);
    let postgres = postgres(root.section("postgres"), mistakes);
    let tables = postgres.as_ref().map(|p| p.tables.as_slice());
    let kafka = kafka(root.section("kafka"));
    let redis = root.optional_section("redis").map(redis);
    let counters = root.optional_section("counters").map(|s| counters(s, tables, mistakes));
    let search = root.optional_section("search").map(|s| search(s, tables, mistakes));
    let mut reader = reader(root.section("reader"));
    let omit = postgres.iter().flat_map(|postgres| &postgres.omit);
    reader.limits.omit = omit.map(|table| (table.schema.clone(), table.name.clone())).collect();
    let snapshot = snapshot(root.section("snapshot"), &mut reader.limits);
    let telemetry = telemetry(root.section("telemetry"), mistakes);
    if counters.as_ref().is_some_and(|list| !list.is_empty()) && redis.is_none() {
        root.section("redis").missing("url", "\"redis://127.0.0.1:6379/0\"");
    }
    root.finish();
    Some(Config {
        pipeline: pipeline?,
        postgres: postgres?,
        kafka: kafka?,
        redis: redis.flatten(),
        counters: counters.unwrap_or_default(),
        search: search.flatten(),
        reader,
        snapshot,
        telemetry,
    })
}

fn pipeline(root: &mut Section, mistakes: &Mistakes) -> Option<Pipeline> {
    let found = root.required("pipeline", "\"mailbox\"")?;
    let parsed = Pipeline::parse(&found.value);
    if parsed.is_none() {
        let what = format!("`{}` is not a name for a pipeline", found.value);
        let remedy = "a letter a-z, then up to 31 of a-z, 0-9 and _, as in mailbox";
        mistakes.add(&found.origin, what, remedy);
    }
    parsed
}

fn postgres(mut section: Section, mistakes: &Mistakes) -> Option<PostgresConfig> {
    let url = section.string("url").map(secret);
    let admin_url = section.string("admin_url").map(secret);
    let tables = match section.strings("tables") {
        Some(found) if found.value.is_empty() => {
            mistakes.add(&found.origin, "`postgres.tables` names no table", "name one: public.emails");
            None
        }
        Some(found) => Some(tables(found.value, mistakes)),
        None => {
            section.missing("tables", "[\"public.emails\"]");
            None
        }
    };
    let oversize = section.optional_section("oversize");
    section.finish();
    let omit = oversize.map(|section| omit(section, tables.as_deref(), mistakes)).unwrap_or_default();
    Some(PostgresConfig { url, admin_url, tables: tables?, omit })
}

/// `[postgres.oversize]`: the tables with "omit".
fn omit(mut section: Section, tables: Option<&[Table]>, mistakes: &Mistakes) -> BTreeSet<Table> {
    let mut omit = BTreeSet::new();
    for choice in section.choices(&["refuse", "omit"]) {
        let omits = choice.value == "omit";
        let name = Found { value: choice.key.clone(), ..choice };
        let Some(table) = table_name(&name, mistakes) else { continue };
        let named = in_pipeline(&table, &name.origin, "`postgres.oversize`", tables, mistakes);
        if omits && named.is_some() {
            omit.insert(table);
        }
    }
    section.finish();
    omit
}

fn tables(found: Vec<Found<String>>, mistakes: &Mistakes) -> Vec<Table> {
    let mut seen = BTreeSet::new();
    let mut tables = Vec::new();
    for name in found {
        let Some(table) = table_name(&name, mistakes) else { continue };
        if seen.insert(table.clone()) {
            tables.push(table);
        } else {
            mistakes.add(&name.origin, format!("table {table} is named twice"), "name it once");
        }
    }
    tables
}

fn table_name(found: &Found<String>, mistakes: &Mistakes) -> Option<Table> {
    let parsed = found.value.parse();
    parsed
        .map_err(|error: change::TableNameError| {
            let what = format!("`{}` does not name a table", found.value);
            mistakes.add(&found.origin, what, error.to_string());
        })
        .ok()
}

fn kafka(mut section: Section) -> Option<KafkaConfig> {
    let bootstrap = section.required("bootstrap", "\"127.0.0.1:9092\"");
    let properties = section.optional_section("properties").map(|mut properties| {
        let named = properties.named_values();
        properties.finish();
        named.into_iter().map(|found| (found.key.clone(), secret(found))).collect()
    });
    let replication_factor =
        section.integer("replication_factor", 1..=1000).and_then(|n| n.value.try_into().ok());
    section.finish();
    Some(KafkaConfig {
        bootstrap: bootstrap?.value,
        properties: properties.unwrap_or_default(),
        replication_factor,
    })
}

fn redis(mut section: Section) -> Option<RedisConfig> {
    let url = section.required("url", "\"redis://127.0.0.1:6379/0\"").map(secret);
    let prefix = section.string("prefix").map(|found| found.value).unwrap_or_default();
    let longest_script =
        milliseconds(&mut section, "longest_script_ms", 5..=5_000, redis_counters::LONGEST_SCRIPT);
    section.finish();
    Some(RedisConfig { url: url?, prefix, longest_script })
}

fn counters(mut section: Section, tables: Option<&[Table]>, mistakes: &Mistakes) -> Vec<CounterConfig> {
    let read = |(name, section)| counter(name, section, tables, mistakes);
    section.named_sections().into_iter().filter_map(read).collect()
}

fn counter(
    name: String,
    mut section: Section,
    tables: Option<&[Table]>,
    mistakes: &Mistakes,
) -> Option<CounterConfig> {
    let sql = section.required("sql", "\"SELECT user_id, count(*) FROM public.emails GROUP BY user_id\"");
    section.finish();
    let sql = sql?;
    if !names::is_counter_name(&name) {
        let remedy = "a letter a-z, then up to 63 of a-z, 0-9, _ and -, as in unread";
        mistakes.add(&sql.origin, format!("`{name}` is not a name for a counter"), remedy);
        return None;
    }
    let definition = match Definition::parse(&name, &sql.value) {
        Ok(definition) => definition,
        Err(refusal) => {
            mistakes.add(&sql.origin, &refusal.what, &refusal.remedy);
            return None;
        }
    };
    let (schema, table) = definition.table();
    let table = Table { schema: schema.into(), name: table.into() };
    in_pipeline(&table, &sql.origin, &format!("counter {name}"), tables, mistakes)?;
    Some(CounterConfig { name, definition })
}

/// Whether `postgres.tables` has the table; where that list itself is wrong, nothing is said.
fn in_pipeline(
    table: &Table,
    origin: &tree::Origin,
    reader: &str,
    tables: Option<&[Table]>,
    mistakes: &Mistakes,
) -> Option<()> {
    let tables = tables?;
    if tables.contains(table) {
        return Some(());
    }
    let list: Vec<String> = tables.iter().chain([table]).map(toml_string).collect();
    let what = format!("{reader} names {table}, which is not in `postgres.tables`");
    mistakes.add(origin, what, format!("add it: tables = [{}]", list.join(", ")));
    None
}

/// A table's name as a string of TOML, which takes JSON's escapes.
fn toml_string(table: &Table) -> String {
    serde_json::Value::from(table.to_string()).to_string()
}

fn search(mut section: Section, tables: Option<&[Table]>, mistakes: &Mistakes) -> Option<SearchConfig> {
    let directory = section.required("directory", "\"/var/lib/millrace/search\"");
    let listen = section.required("listen", "\"127.0.0.1:7700\"");
    let listen = listen.and_then(|found| address(found, mistakes));
    let commit_interval =
        milliseconds(&mut section, "commit_interval_ms", 1..=600_000, Duration::from_secs(1));
    let heap_mb = section.integer("heap_mb", 15..=4_096).map_or(50, |found| found.value);
    let indexes = section.optional_section("indexes").map(|mut indexes| {
        let read = |(name, section)| index(name, section, tables, mistakes);
        indexes.named_sections().into_iter().filter_map(read).collect::<Vec<_>>()
    });
    section.finish();
    Some(SearchConfig {
        directory: directory?.value.into(),
        listen: listen?,
        commit_interval,
        heap: (heap_mb as usize) * 1_000_000,
        indexes: indexes.unwrap_or_default(),
    })
}

fn index(
    name: String,
    mut section: Section,
    tables: Option<&[Table]>,
    mistakes: &Mistakes,
) -> Option<IndexDefinition> {
    let found = section.required("table", "\"public.emails\"");
    let mut columns = |key| -> Vec<String> {
        let found = section.strings(key).map(|found| found.value).unwrap_or_default();
        found.into_iter().map(|column| column.value).collect()
    };
    let (text, exact) = (columns("text"), columns("exact"));
    let (number, date) = (columns("number"), columns("date"));
    section.finish();
    let found = found?;
    let table = table_name(&found, mistakes)?;
    in_pipeline(&table, &found.origin, &format!("index {name}"), tables, mistakes)?;
    let Table { schema, name: table } = table;
    let definition = IndexDefinition { name, schema, table, text, exact, number, date };
    match definition.validate() {
        Ok(()) => Some(definition),
        Err(refusal) => {
            mistakes.add(&found.origin, refusal.what, refusal.remedy);
            None
        }
    }
}

fn reader(mut section: Section) -> ReaderConfig {
    let defaults = Limits::default();
    let batch_kb = section.integer("batch_kb", 64..=1_048_576);
    let limits = Limits {
        commit_bytes: batch_kb.map_or(defaults.commit_bytes, |found| (found.value as usize) * 1024),
        commit_interval: milliseconds(
            &mut section,
            "commit_interval_ms",
            1..=60_000,
            defaults.commit_interval,
        ),
        idle_interval: milliseconds(&mut section, "idle_interval_ms", 10..=60_000, defaults.idle_interval),
        heartbeat_interval: milliseconds(
            &mut section,
            "heartbeat_interval_ms",
            100..=600_000,
            defaults.heartbeat_interval,
        ),
        ..defaults
    };
    let outage_limit =
        milliseconds(&mut section, "outage_limit_ms", 1_000..=3_600_000, Duration::from_secs(30));
    section.finish();
    ReaderConfig { limits, outage_limit }
}

fn snapshot(mut section: Section, limits: &mut Limits) -> SnapshotConfig {
    let mut number = |key, range| section.integer(key, range).map(|found| found.value.unsigned_abs());
    if let Some(kb) = number("round_kb", 1..=1_048_576) {
        limits.round_bytes = kb << 10;
    }
    limits.snapshot_rate = number("rate_kb", 1..=i64::MAX >> 10).map(|kb| kb << 10);
    let connections = number("connections", 1..=16).map_or(SNAPSHOT_CONNECTIONS, |n| n as usize);
    let keyless_bytes = number("keyless_mb", 1..=1_048_576).unwrap_or(KEYLESS_MB) << 20;
    section.finish();
    SnapshotConfig { connections, keyless_bytes }
}

fn telemetry(mut section: Section, mistakes: &Mistakes) -> TelemetryConfig {
    let mut listen = section.section("listen");
    let mut at = |key| listen.string(key).and_then(|found| address(found, mistakes));
    let config = TelemetryConfig { reader: at("reader"), counters: at("counters"), search: at("search") };
    listen.finish();
    section.finish();
    config
}

fn milliseconds(
    section: &mut Section,
    key: &str,
    range: std::ops::RangeInclusive<i64>,
    default: Duration,
) -> Duration {
    section.integer(key, range).map_or(default, |found| Duration::from_millis(found.value.unsigned_abs()))
}

fn address(found: Found<String>, mistakes: &Mistakes) -> Option<SocketAddr> {
    let parsed = found.value.parse().ok();
    if parsed.is_none() {
        let what = format!("`{}` is `{}`, which is no address to listen on", found.key, found.value);
        mistakes.add(
            &found.origin,
            what,
            "write IP:PORT, as in 127.0.0.1:7700 or [::1]:7700 or 0.0.0.0:7700",
        );
    }
    parsed
}

fn secret(found: Found<String>) -> Secret {
    Secret(found.value)
}
