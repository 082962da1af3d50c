use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use tempfile::TempDir;
use tokio::runtime::Runtime;
use tokio_postgres::{Client, NoTls, SimpleQueryMessage};

use super::process::{Process, free_port, wait_until};

/// Time for anything that a healthy server does in a second or two, on a machine that is very busy.
const PATIENCE: Duration = Duration::from_secs(60);

/// Configuration of every test server; `start_with` adds to it.
const SETTINGS: &[(&str, &str)] = &[
    ("wal_level", "logical"),
    ("fsync", "on"),
    ("max_wal_senders", "20"),
    ("max_replication_slots", "20"),
    ("max_prepared_transactions", "20"),
    ("shared_buffers", "32MB"),
    ("max_wal_size", "256MB"),
    ("listen_addresses", "127.0.0.1"),
    ("log_min_messages", "log"),
];

/// A result of `sql`: the rows of all its statements, each value as text, NULL as `None`.
pub type Rows = Vec<Vec<Option<String>>>;

/// A real Postgres on 127.0.0.1 and on a unix socket, with logical decoding on and trust authentication.
///
/// The programs are those in `MILLRACE_PG_BIN`, else the newest of `/usr/lib/postgresql/*/bin`, else those in
/// `PATH`. As root it runs as the user `postgres`. Dropping it stops it and removes its files.
#[derive(Debug)]
pub struct Postgres {
    process: Option<Process>,
    port: u16,
    bin: PathBuf,
    owner: Option<Owner>,
    dir: TempDir,
}

/// The user that the server must run as when we are root.
#[derive(Clone, Copy, Debug)]
struct Owner {
    uid: u32,
    gid: u32,
}

impl Postgres {
    /// A server with the settings above.
    ///
    /// # Panics
    /// When it does not come up.
    pub fn start() -> Self {
        Self::start_with(&[])
    }

    /// A server with further lines of postgresql.conf.
    ///
    /// # Panics
    /// When it does not come up; the message ends with the server's log.
    pub fn start_with(extra_conf: &[(&str, &str)]) -> Self {
        let dir = tempfile::Builder::new().prefix("millrace-pg-").tempdir().expect("a temporary directory");
        let owner = Owner::needed(dir.path());
        if let Some(owner) = owner {
            chown(dir.path(), Some(owner.uid), Some(owner.gid)).expect("root may chown");
        }
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).expect("our own directory");
        let mut server = Postgres { process: None, port: 0, bin: find_bin(), owner, dir };
        server.initdb();
        let conf: String = SETTINGS
            .iter()
            .chain(extra_conf)
            .map(|(name, value)| format!("{name} = '{}'\n", value.replace('\'', "''")))
            .collect();
        let file = server.data_dir().join("postgresql.conf");
        let default = fs::read_to_string(&file).expect("initdb wrote it");
        fs::write(&file, default + &conf).expect("our own file");
        // Another process may take the port between our asking and the server's binding.
        for _ in 0..5 {
            server.port = free_port();
            if server.launch() {
                return server;
            }
        }
        panic!("Postgres does not start:\n{}", server.log());
    }

    /// A connection string for `db` as the superuser `postgres`, over TCP.
    pub fn url(&self, db: &str) -> String {
        format!("postgres://postgres@127.0.0.1:{}/{db}", self.port)
    }

    /// The port, on 127.0.0.1 and in the socket's name.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The directory of the unix socket.
    pub fn socket_dir(&self) -> &Path {
        self.dir.path()
    }

    /// The data directory.
    pub fn data_dir(&self) -> PathBuf {
        self.dir.path().join("data")
    }

    /// One of the programs that come with this server, ready to run as the server's user.
    pub fn program(&self, name: &str) -> Command {
        let mut command = Command::new(self.bin.join(name));
        if let Some(owner) = self.owner {
            command.uid(owner.uid).gid(owner.gid);
        }
        command.current_dir(self.dir.path()).env("LC_ALL", "C.UTF-8").stdin(Stdio::null());
        command
    }

    /// kill -9 of the whole server; returns when no process of it is left.
    pub fn kill(&mut self) {
        if let Some(mut process) = self.process.take() {
            process.kill();
        }
        wait_until("end of the server's processes", PATIENCE, || {
            let left = self.processes();
            for pid in &left {
                let _ = Command::new("kill").args(["-9", pid]).stderr(Stdio::null()).status();
            }
            left.is_empty().then_some(())
        });
    }

    /// Starts it again, after `kill` or `stop_fast`, or restarts it fast while it runs: the same files and port.
    ///
    /// # Panics
    /// When it does not come up.
    pub fn restart(&mut self) {
        if self.process.is_some() && !self.stop_fast(PATIENCE) {
            self.kill();
        }
        assert!(self.launch(), "Postgres does not start again:\n{}", self.log());
    }

    /// `pg_ctl stop -m fast`; whether the server has stopped within `timeout`.
    pub fn stop_fast(&mut self, timeout: Duration) -> bool {
        let mut command = self.program("pg_ctl");
        command.args(["stop", "-s", "-m", "fast", "-t"]).arg(timeout.as_secs().max(1).to_string());
        command.arg("-D").arg(self.data_dir()).stderr(Stdio::null());
        let stopped = command.status().is_ok_and(|status| status.success());
        if stopped && let Some(mut process) = self.process.take() {
            process.wait(PATIENCE);
        }
        stopped
    }

    /// Replaces pg_hba.conf and has the server read it again. Local socket connections of `postgres` stay trusted.
    pub fn set_hba(&self, lines: &str) {
        let head = "local all postgres trust\nlocal replication postgres trust\n";
        fs::write(self.data_dir().join("pg_hba.conf"), format!("{head}{lines}\n")).expect("our own file");
        self.reload();
    }

    /// Has the server read its configuration again; returns when it has.
    pub fn reload(&self) {
        let before = self.log().matches("received SIGHUP").count();
        self.process.as_ref().expect("it runs").signal("HUP");
        wait_until("reload of the configuration", PATIENCE, || {
            (self.log().matches("received SIGHUP").count() > before).then_some(())
        });
    }

    /// Runs statements on a connection of their own; several separated by `;` are one transaction, as in
    /// `psql -c`, unless they say otherwise.
    ///
    /// # Panics
    /// When one fails.
    pub fn sql(&self, db: &str, statements: &str) -> Rows {
        self.session(db).sql(statements)
    }

    /// The first value of the first row of a query; NULL is the empty text.
    ///
    /// # Panics
    /// When the query fails or gives no row.
    pub fn value(&self, db: &str, query: &str) -> String {
        let first = self.sql(db, query).into_iter().next().and_then(|row| row.into_iter().next());
        first.unwrap_or_else(|| panic!("no row from {query}")).unwrap_or_default()
    }

    /// A connection that stays, for transactions that a test holds open.
    ///
    /// # Panics
    /// When the server refuses it.
    pub fn session(&self, db: &str) -> Session {
        Session::connect(&self.session_config(db)).unwrap_or_else(|e| panic!("connecting to {db}: {e:?}"))
    }

    /// How to connect as a session does: over the unix socket, as the superuser. For threads, and for the time after a
    /// crash.
    pub fn session_config(&self, db: &str) -> tokio_postgres::Config {
        let mut config = tokio_postgres::Config::new();
        config.host_path(self.socket_dir()).port(self.port).user("postgres").dbname(db);
        config
    }

    /// The server's log so far.
    pub fn log(&self) -> String {
        fs::read(self.dir.path().join("log"))
            .map(|b| String::from_utf8_lossy(&b).into_owned())
            .unwrap_or_default()
    }

    /// Copies a fresh cluster, which takes a tenth of the time that it takes to make one. So all have one system identifier.
    fn initdb(&self) {
        let mut command = self.program("initdb");
        let version = command.arg("--version").output().unwrap_or_else(|e| panic!("{command:?}: {e}"));
        let version: String = String::from_utf8_lossy(&version.stdout)
            .chars()
            .map(|c| if c.is_ascii_alphanumeric() || c == '.' { c } else { '-' })
            .collect();
        let cache = match self.owner {
            // Which the server's user can read.
            Some(_) => PathBuf::from("/var/cache/millrace"),
            None => super::kafka::cache(),
        };
        let template = cache.join(format!("cluster-{}", version.trim_end_matches('-')));
        if !template.exists() {
            self.make_cluster();
            fs::create_dir_all(&cache).expect("the cache can be written");
            let copied = tempfile::tempdir_in(&cache).expect("the cache can be written");
            copy(&self.data_dir(), &copied.path().join("data"));
            // Where another test was first its copy stays.
            drop(fs::rename(copied.path().join("data"), &template));
            return;
        }
        copy(&template, &self.data_dir());
    }

    fn make_cluster(&self) {
        let mut command = self.program("initdb");
        command.args(["-A", "trust", "-U", "postgres", "-E", "UTF8", "--locale=C.UTF-8", "--no-sync", "-D"]);
        let output = command.arg(self.data_dir()).output().unwrap_or_else(|e| panic!("{command:?}: {e}"));
        assert!(output.status.success(), "initdb: {}", String::from_utf8_lossy(&output.stderr));
    }

    /// Whether the server is up; `false` when it ended at once.
    fn launch(&mut self) -> bool {
        let log = fs::File::options().create(true).append(true).open(self.dir.path().join("log"));
        let log = log.expect("our own file");
        let mut command = self.program("postgres");
        command.arg("-D").arg(self.data_dir()).arg("-k").arg(self.socket_dir());
        command.arg("-p").arg(self.port.to_string());
        command.stdout(log.try_clone().expect("a second handle")).stderr(log);
        // Of its own group, so that Ctrl-C reaches the test first, which then stops the server.
        command.process_group(0);
        let mut process = Process::spawn(&mut command);
        let pid = process.id().to_string();
        let ready = wait_until("start of Postgres", PATIENCE, || {
            if process.ended().is_some() {
                return Some(false);
            }
            let file = fs::read_to_string(self.data_dir().join("postmaster.pid")).unwrap_or_default();
            let lines: Vec<&str> = file.lines().map(str::trim).collect();
            (lines.first() == Some(&pid.as_str()) && lines.get(7) == Some(&"ready")).then_some(true)
        });
        self.process = ready.then_some(process);
        ready
    }

    /// Ids of the living processes of this server: they all work in its data directory, and no other process does.
    fn processes(&self) -> Vec<String> {
        let data = self.data_dir();
        let all = fs::read_dir("/proc").into_iter().flatten().flatten();
        all.filter(|entry| fs::read_link(entry.path().join("cwd")).is_ok_and(|cwd| cwd == data))
            .filter_map(|entry| entry.file_name().into_string().ok())
            .collect()
    }
}

impl Drop for Postgres {
    fn drop(&mut self) {
        if let Some(process) = &mut self.process {
            // An "immediate" shutdown gives its shared memory back, which kill -9 does not.
            process.signal("QUIT");
            let start = std::time::Instant::now();
            while process.ended().is_none() && start.elapsed() < Duration::from_secs(5) {
                std::thread::sleep(Duration::from_millis(5));
            }
        }
        self.kill();
    }
}

impl Owner {
    /// `None` when we are not root: `dir` is ours, so its owner tells.
    fn needed(dir: &Path) -> Option<Self> {
        if fs::metadata(dir).expect("our own directory").uid() != 0 {
            return None;
        }
        let id = |flag: &str| {
            let output = Command::new("id").args([flag, "postgres"]).output().expect("`id` runs");
            let text = String::from_utf8_lossy(&output.stdout).trim().to_owned();
            text.parse().expect("a user `postgres`: Postgres refuses to run as root")
        };
        Some(Owner { uid: id("-u"), gid: id("-g") })
    }
}

/// An open connection as superuser, driven by a thread of its own.
#[derive(Debug)]
pub struct Session {
    // Before the runtime, so that it says goodbye first.
    client: Client,
    runtime: Runtime,
}

impl Session {
    /// Connects without TLS.
    pub fn connect(config: &tokio_postgres::Config) -> Result<Self, tokio_postgres::Error> {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
        let runtime = runtime.expect("a thread for the connection");
        let (client, connection) = apart(|| runtime.block_on(config.connect(NoTls)))?;
        // Ends when the client is dropped or the server goes away; either shows at the client.
        runtime.spawn(connection);
        Ok(Session { client, runtime })
    }

    /// Runs statements.
    ///
    /// # Panics
    /// When one fails.
    pub fn sql(&self, statements: &str) -> Rows {
        self.try_sql(statements).unwrap_or_else(|e| panic!("{statements}: {e:?}"))
    }

    /// Runs statements.
    pub fn try_sql(&self, statements: &str) -> Result<Rows, tokio_postgres::Error> {
        let messages = apart(|| self.runtime.block_on(self.client.simple_query(statements)))?;
        let rows = messages.into_iter().filter_map(|message| match message {
            SimpleQueryMessage::Row(row) => Some(row),
            _ => None,
        });
        Ok(rows.map(|row| (0..row.len()).map(|i| row.get(i).map(str::to_owned)).collect()).collect())
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        // A runtime must not be dropped inside another one, where an async test may drop us.
        let stopped =
            tokio::runtime::Builder::new_current_thread().build().expect("a runtime without drivers");
        std::mem::replace(&mut self.runtime, stopped).shutdown_background();
    }
}

/// Runs `work` on a thread of its own: the caller's may belong to a runtime, where blocking is refused.
fn apart<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| scope.spawn(work).join().expect("the work does not panic"))
}

/// Copies a directory, owners and rights with it.
fn copy(from: &Path, to: &Path) {
    let status = Command::new("cp").arg("-a").args([from, to]).status().expect("cp runs");
    assert!(status.success(), "cp -a {from:?} {to:?}");
}

fn find_bin() -> PathBuf {
    if let Some(dir) = std::env::var_os("MILLRACE_PG_BIN") {
        return dir.into();
    }
    let versions = fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten();
    let major = |name: OsString| name.to_str().and_then(|name| name.parse::<u32>().ok());
    let newest = versions
        .filter(|version| version.path().join("bin/initdb").exists())
        .max_by_key(|version| major(version.file_name()));
    match newest {
        Some(version) => version.path().join("bin"),
        // A bare program name is looked up in PATH.
        None => PathBuf::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn survives_kill_and_stops_fast() {
        let mut server = Postgres::start_with(&[("work_mem", "5MB")]);
        assert_eq!(
            server.sql("postgres", "SELECT 1, NULL; SHOW work_mem"),
            [vec![Some("1".into()), None], vec![Some("5MB".into())]]
        );
        let open = server.session("postgres");
        open.sql("CREATE TABLE t (a int); BEGIN; INSERT INTO t VALUES (1)");
        server.sql("postgres", "CREATE TABLE u AS SELECT 7 AS a");
        server.kill();
        assert_eq!(server.processes(), Vec::<String>::new());
        assert!(open.try_sql("SELECT 1").is_err());
        server.restart();
        assert_eq!(server.value("postgres", "SELECT a FROM u"), "7");
        assert!(server.stop_fast(Duration::from_secs(20)));
        server.restart();
        assert_eq!(server.value("postgres", "SHOW wal_level"), "logical");
    }
}
