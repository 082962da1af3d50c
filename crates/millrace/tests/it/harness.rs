//! A pipeline on servers of its own, and ways to hurt it.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use serde_json::Value;
use tempfile::TempDir;
use testkit::services::{LentKafka, Postgres, Process, Redis, free_port, wait_until};

/// How long anything may take that should happen soon, on a loaded machine.
pub(crate) const SOON: Duration = Duration::from_secs(90);

/// The binary under test.
pub(crate) const THIS_BUILD: &str = env!("CARGO_BIN_EXE_millrace");

/// The processes that Millrace consists of.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) enum Role {
    Reader,
    Counters,
    Search,
}

pub(crate) const ROLES: [Role; 3] = [Role::Reader, Role::Counters, Role::Search];

impl Role {
    pub(crate) fn command(self) -> &'static str {
        match self {
            Role::Reader => "reader",
            Role::Counters => "counters",
            Role::Search => "search",
        }
    }
}

/// Servers, a configuration, and the processes that run.
pub(crate) struct Pipeline {
    /// The binary that commands and processes run.
    program: PathBuf,
    processes: BTreeMap<Role, Process>,
    pub(crate) postgres: Postgres,
    pub(crate) kafka: LentKafka,
    pub(crate) redis: Redis,
    pub(crate) directory: TempDir,
    search_port: u16,
}

impl Pipeline {
    /// Fresh servers with the mailbox's tables, and a configuration; nothing set up yet.
    pub(crate) fn new() -> Self {
        let postgres = Postgres::start();
        postgres.sql("postgres", "CREATE DATABASE app");
        postgres.sql("app", super::mailbox::SCHEMA);
        let directory = tempfile::Builder::new().prefix("millrace-").tempdir().expect("a directory");
        let pipeline = Pipeline {
            program: THIS_BUILD.into(),
            processes: BTreeMap::new(),
            postgres,
            kafka: LentKafka::lend(),
            redis: Redis::start(),
            directory,
            search_port: free_port(),
        };
        pipeline.configure("");
        pipeline
    }

    /// A pipeline that is set up and runs, its empty tables read.
    pub(crate) fn running() -> Self {
        Self::running_with("")
    }

    /// The same with more in its configuration.
    pub(crate) fn running_with(extra: &str) -> Self {
        let mut pipeline = Self::new();
        pipeline.configure(extra);
        pipeline.succeed(&["setup"]);
        ROLES.into_iter().for_each(|role| pipeline.spawn(role));
        pipeline.succeed(&["wait", "--timeout", "90s"]);
        pipeline
    }

    /// Writes the configuration; `extra` is appended.
    pub(crate) fn configure(&self, extra: &str) {
        let text = format!(
            "pipeline = \"mailbox\"\n\
             [postgres]\nurl = \"{}\"\ntables = [\"public.emails\", \"public.users\", \"public.points\"]\n\
             [kafka]\nbootstrap = \"{}\"\n\
             [redis]\nurl = \"{}\"\n\
             {}\n\
             [search]\ndirectory = \"{}\"\nlisten = \"127.0.0.1:{}\"\n\
             [search.indexes.emails]\ntable = \"public.emails\"\ntext = [\"subject\", \"body\"]\n\
             exact = [\"user_id\", \"folder\", \"sender\"]\nnumber = [\"size\"]\ndate = [\"sent_at\"]\n{extra}",
            self.postgres.url("app"),
            self.kafka.bootstrap(),
            self.redis.url(),
            super::mailbox::counters_toml(),
            self.directory.path().join("search").display(),
            self.search_port,
        );
        fs::write(self.config(), text).expect("our directory");
    }

    /// Writes a configuration of these tables (a list of quoted names), and no stores.
    pub(crate) fn configure_tables(&self, tables: &str, extra: &str) {
        let text = format!(
            "pipeline = \"mailbox\"\n[postgres]\nurl = \"{}\"\ntables = [{tables}]\n[kafka]\nbootstrap = \"{}\"\n{extra}",
            self.postgres.url("app"),
            self.kafka.bootstrap(),
        );
        fs::write(self.config(), text).expect("our directory");
    }

    /// Lets the processes run as another role than the one for DDL.
    pub(crate) fn set_url(&self, url: &str, admin: &str) {
        let text = fs::read_to_string(self.config()).expect("a configuration");
        let known = format!("url = \"{}\"", self.postgres.url("app"));
        let urls = format!("url = \"{url}\"\nadmin_url = \"{admin}\"");
        fs::write(self.config(), text.replacen(&known, &urls, 1)).expect("our directory");
    }

    /// Has everything that is started from now on run this binary.
    pub(crate) fn run_program(&mut self, program: impl Into<PathBuf>) {
        self.program = program.into();
    }

    fn config(&self) -> PathBuf {
        self.directory.path().join("millrace.toml")
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(&self.program);
        // The tests' own settings are not the binary's.
        std::env::vars().filter(|(name, _)| name.starts_with("MILLRACE_")).for_each(|(name, _)| {
            command.env_remove(name);
        });
        command.arg("--config").arg(self.config()).args(arguments).stdin(Stdio::null());
        command
    }

    /// Runs a command to its end.
    pub(crate) fn millrace(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().expect("the binary runs")
    }

    /// Runs a command that must succeed; gives what it printed.
    pub(crate) fn succeed(&self, arguments: &[&str]) -> String {
        let output = self.millrace(arguments);
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "millrace {arguments:?}: {:?}\n{error}", output.status);
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// Runs a command that must be refused (exit code 3); gives what it said.
    pub(crate) fn refused(&self, arguments: &[&str]) -> String {
        let output = self.millrace(arguments);
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(3), "millrace {arguments:?}: {error}");
        error
    }

    /// Starts a process; its log is appended to a file that [`log`](Self::log) reads.
    pub(crate) fn spawn(&mut self, role: Role) {
        let process = self.process(&[role.command()], role.command());
        self.processes.insert(role, process);
    }

    /// Starts any command as a process whose log goes to `name`.
    pub(crate) fn process(&self, arguments: &[&str], name: &str) -> Process {
        let log = fs::File::options().create(true).append(true).open(self.log_path(name)).expect("a log");
        let mut command = self.command(arguments);
        Process::spawn(command.stdout(log.try_clone().expect("a second handle")).stderr(log))
    }

    /// The same on a host of this name: in a UTS namespace of its own, which needs root.
    pub(crate) fn process_on(&self, host: &str, arguments: &[&str], name: &str) -> Process {
        let log = fs::File::options().create(true).append(true).open(self.log_path(name)).expect("a log");
        let millrace = self.command(arguments);
        let mut command = Command::new("unshare");
        command.args(["--uts", "sh", "-c", r#"hostname "$0" && exec "$@""#, host]);
        command.arg(millrace.get_program()).args(millrace.get_args()).stdin(Stdio::null());
        for (key, _) in millrace.get_envs() {
            command.env_remove(key);
        }
        Process::spawn(command.stdout(log.try_clone().expect("a second handle")).stderr(log))
    }

    /// Starts a process that dies at a stage, as `kill -9` would end it, and waits for that.
    pub(crate) fn dies_at(&self, stage: &str, arguments: &[&str], name: &str) {
        let log = fs::File::options().create(true).append(true).open(self.log_path(name)).expect("a log");
        let mut command = self.command(arguments);
        command.env("FAILPOINT", stage).stdout(log.try_clone().expect("a second handle")).stderr(log);
        let status = Process::spawn(&mut command).wait(SOON);
        assert_eq!(status.signal(), Some(6), "{stage}: {status}\n{}", tail(&self.log(name)));
    }

    fn log_path(&self, name: &str) -> PathBuf {
        self.directory.path().join(format!("{name}.log"))
    }

    /// What a process has logged.
    pub(crate) fn log(&self, name: &str) -> String {
        fs::read_to_string(self.log_path(name)).unwrap_or_default()
    }

    pub(crate) fn search_url(&self) -> String {
        format!("http://127.0.0.1:{}", self.search_port)
    }

    pub(crate) fn search_directory(&self) -> PathBuf {
        self.directory.path().join("search")
    }

    /// kill -9.
    pub(crate) fn kill(&mut self, role: Role) {
        if let Some(mut process) = self.processes.remove(&role) {
            process.kill();
        }
    }

    pub(crate) fn running_process(&mut self, role: Role) -> &mut Process {
        self.processes.get_mut(&role).unwrap_or_else(|| panic!("{role:?} runs"))
    }

    /// kill -9 and start again.
    pub(crate) fn restart(&mut self, role: Role) {
        self.kill(role);
        self.spawn(role);
    }

    /// Panics with the log of a process that ended by itself.
    pub(crate) fn assert_alive(&mut self) {
        for (role, process) in &mut self.processes {
            if let Some(status) = process.ended() {
                let log = fs::read_to_string(self.directory.path().join(format!("{}.log", role.command())));
                panic!("{role:?} ended by itself: {status}\n{}", tail(&log.unwrap_or_default()));
            }
        }
    }

    /// One counter as Redis shows it; a counter without groups has the key "".
    pub(crate) fn counter(&self, name: &str) -> BTreeMap<String, String> {
        let mut connection = self.redis.connect();
        let kind: String = redis::cmd("TYPE").arg(name).query(&mut connection).expect("Redis answers");
        match kind.as_str() {
            "hash" => redis::cmd("HGETALL").arg(name).query(&mut connection).expect("a hash"),
            "string" => {
                let value = redis::cmd("GET").arg(name).query(&mut connection).expect("a string");
                BTreeMap::from([(String::new(), value)])
            }
            _ => BTreeMap::new(),
        }
    }

    /// GET on the search service.
    pub(crate) fn get(&self, path: &str) -> Option<Value> {
        fetch(&format!("{}{path}", self.search_url()))
    }

    /// Every document of the index, by id.
    pub(crate) fn documents(&self) -> Option<BTreeMap<String, Value>> {
        let mut all = BTreeMap::new();
        loop {
            let page = self.get(&format!("/indexes/emails/documents?limit=1000&offset={}", all.len()))?;
            if page["checkpoint"]["ready"] != true {
                return None;
            }
            let documents = page["results"].as_array()?.clone();
            let total = page["total"].as_u64()?;
            for document in &documents {
                all.insert(text(&document["id"]), document.clone());
            }
            if documents.is_empty() || all.len() as u64 >= total {
                return Some(all);
            }
        }
    }

    /// Waits until every store equals what SQL says, with nothing writing.
    pub(crate) fn assert_stores_equal(&mut self) {
        let mut found = String::new();
        let start = std::time::Instant::now();
        while start.elapsed() < SOON {
            match self.difference() {
                None => return,
                Some(difference) => found = difference,
            }
            self.assert_alive();
            std::thread::sleep(Duration::from_millis(100));
        }
        panic!("the stores differ from Postgres after {SOON:?}:\n{found}");
    }

    /// The first difference between SQL's answer and a store's.
    pub(crate) fn difference(&self) -> Option<String> {
        for (name, sql) in super::mailbox::COUNTERS {
            let expected = super::mailbox::answer(&self.postgres, sql);
            let found = self.counter(name);
            if found != expected {
                return Some(format!("counter {name}:\n SQL   {expected:?}\n Redis {found:?}"));
            }
        }
        let Some(found) = self.documents() else { return Some("the search service does not answer".into()) };
        let found: BTreeMap<String, Vec<String>> =
            found.into_iter().map(|(id, document)| (id, super::mailbox::fields_of(&document))).collect();
        let expected = super::mailbox::documents(&self.postgres);
        if found == expected {
            return None;
        }
        let wrong = expected.iter().find(|(id, row)| found.get(*id) != Some(row));
        let extra = found.keys().find(|id| !expected.contains_key(*id));
        let shown = wrong.map(|(id, row)| format!("SQL {row:?}, index {:?}", found.get(id)));
        Some(format!(
            "documents: {} in SQL, {} in the index; {shown:?}; extra {extra:?}",
            expected.len(),
            found.len()
        ))
    }
}

/// A test that fails shows what the processes said last.
impl Drop for Pipeline {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            return;
        }
        let files = fs::read_dir(self.directory.path()).into_iter().flatten().flatten();
        let mut logs: Vec<PathBuf> = files.map(|file| file.path()).collect();
        logs.retain(|path| path.extension().is_some_and(|end| end == "log"));
        logs.sort();
        for path in logs {
            eprintln!("--- {}\n{}", path.display(), tail(&fs::read_to_string(&path).unwrap_or_default()));
        }
    }
}

/// The answer to a GET as JSON.
pub(crate) fn fetch(url: &str) -> Option<Value> {
    ureq::get(url).call().ok()?.body_mut().read_json().ok()
}

/// A JSON value as text, a string without quotes.
pub(crate) fn text(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

/// The end of a log.
pub(crate) fn tail(log: &str) -> String {
    let lines: Vec<&str> = log.lines().collect();
    lines[lines.len().saturating_sub(25)..].join("\n")
}

/// Copies a directory.
pub(crate) fn copy_directory(from: &Path, to: &Path) {
    let status = Command::new("cp").arg("-a").arg(from).arg(to).status().expect("cp runs");
    assert!(status.success(), "cp {from:?} {to:?}");
}

/// Waits for something to be true.
pub(crate) fn soon(what: &str, mut condition: impl FnMut() -> bool) {
    wait_until(what, SOON, || condition().then_some(()));
}
