use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use redis::{Client, Connection};
use tempfile::TempDir;

use super::{Process, free_port, wait_until};

const START_DEADLINE: Duration = Duration::from_secs(20);
/// Another copy of the tests may take a free port between our look and the server's bind.
const PORT_ATTEMPTS: u32 = 5;

/// A real redis-server in a temporary directory, with an append-only file, on a port and a socket of its own.
#[derive(Debug)]
pub struct Redis {
    process: Option<Process>,
    directory: TempDir,
    port: u16,
    settings: Vec<(String, String)>,
}

impl Redis {
    /// Starts a server; its append-only file is synced every second, which outlives kill -9 of the process.
    ///
    /// # Panics
    /// When redis-server cannot be started.
    pub fn start() -> Self {
        Self::start_with(&[])
    }

    /// Starts a server with further settings, as redis.conf has them: `("appendfsync", "always")`.
    ///
    /// # Panics
    /// When redis-server cannot be started.
    pub fn start_with(settings: &[(&str, &str)]) -> Self {
        let directory = tempfile::Builder::new().prefix("redis-").tempdir().expect("a temporary directory");
        let settings = settings.iter().map(|(name, value)| (name.to_string(), value.to_string())).collect();
        let mut redis = Redis { process: None, directory, port: 0, settings };
        for _ in 0..PORT_ATTEMPTS {
            redis.port = free_port();
            if redis.launch() {
                return redis;
            }
        }
        panic!("redis-server does not start: {}", redis.log());
    }

    /// `redis://127.0.0.1:PORT/0`.
    pub fn url(&self) -> String {
        format!("redis://127.0.0.1:{}/0", self.port)
    }

    /// `unix://…/redis.sock`.
    pub fn unix_url(&self) -> String {
        format!("unix://{}", self.directory.path().join("redis.sock").display())
    }

    /// Its port on 127.0.0.1; the same after a restart.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Its process id.
    ///
    /// # Panics
    /// While it does not run.
    pub fn id(&self) -> u32 {
        self.process.as_ref().expect("redis-server runs").id()
    }

    /// A connection, for a test's own look.
    ///
    /// # Panics
    /// When the server cannot be reached.
    pub fn connect(&self) -> Connection {
        self.try_connect().expect("the server was started")
    }

    /// kill -9.
    pub fn kill(&mut self) {
        if let Some(mut process) = self.process.take() {
            process.kill();
        }
    }

    /// Orderly end.
    ///
    /// # Panics
    /// When it does not end.
    pub fn stop(&mut self) {
        if let Some(mut process) = self.process.take() {
            process.signal("TERM");
            process.wait(START_DEADLINE);
        }
    }

    /// Starts again after [`kill`](Self::kill) or [`stop`](Self::stop), with the same data on the same port; stops
    /// it first when it runs.
    ///
    /// # Panics
    /// When it does not start.
    pub fn restart(&mut self) {
        self.stop();
        assert!(self.launch(), "redis-server does not start again: {}", self.log());
    }

    /// Freezes the process (SIGSTOP): connections stay open and nothing answers.
    pub fn pause(&self) {
        self.running().signal("STOP");
    }

    /// Ends [`pause`](Self::pause).
    pub fn resume(&self) {
        self.running().signal("CONT");
    }

    /// Copies the data as it is now to `target`, a directory that is made: everything that was answered is in it.
    ///
    /// # Panics
    /// When it cannot be copied.
    pub fn dump_to(&self, target: &Path) {
        copy_directory(&self.data(), target);
    }

    /// kill -9, puts back what [`dump_to`](Self::dump_to) kept, and starts.
    ///
    /// # Panics
    /// When it cannot be put back, or the server does not start.
    pub fn restore_from(&mut self, dump: &Path) {
        self.kill();
        fs::remove_dir_all(self.data()).expect("the data directory is ours");
        copy_directory(dump, &self.data());
        self.restart();
    }

    fn data(&self) -> PathBuf {
        self.directory.path().join("data")
    }

    fn log(&self) -> String {
        fs::read_to_string(self.directory.path().join("log")).unwrap_or_default()
    }

    fn running(&self) -> &Process {
        self.process.as_ref().expect("the server runs")
    }

    fn try_connect(&self) -> redis::RedisResult<Connection> {
        // By socket: it answers whatever password the settings ask of the default user on TCP or not, and it
        // cannot reach somebody else's server.
        Client::open(self.unix_url())?.get_connection()
    }

    /// Starts the server and waits until it answers; false when it ended at once.
    fn launch(&mut self) -> bool {
        fs::create_dir_all(self.data()).expect("the temporary directory is ours");
        let mut command = Command::new("redis-server");
        command.arg("--port").arg(self.port.to_string()).arg("--bind").arg("127.0.0.1");
        command.arg("--dir").arg(self.data()).arg("--logfile").arg(self.directory.path().join("log"));
        command.arg("--unixsocket").arg(self.directory.path().join("redis.sock"));
        // Without rewrites a copy of the append-only directory is whole at any moment.
        let fixed = [
            ("save", ""),
            ("appendonly", "yes"),
            ("appendfsync", "everysec"),
            ("auto-aof-rewrite-percentage", "0"),
            ("maxmemory-policy", "noeviction"),
        ];
        for (name, value) in fixed {
            command.arg(format!("--{name}")).arg(value);
        }
        for (name, value) in &self.settings {
            command.arg(format!("--{name}")).args(value.split(' '));
        }
        let mut process = Process::spawn(command.stdin(Stdio::null()).stdout(Stdio::null()));
        let answers = wait_until("answer of redis-server", START_DEADLINE, || {
            if process.ended().is_some() {
                return Some(false);
            }
            // Anything but a refused connection or "loading" is an answer, a demand for a password too.
            match self.try_connect().and_then(|mut c| redis::cmd("PING").exec(&mut c)) {
                Ok(()) => Some(true),
                Err(e) if e.is_io_error() || e.code() == Some("LOADING") => None,
                Err(_) => Some(true),
            }
        });
        self.process = answers.then_some(process);
        answers
    }
}

fn copy_directory(from: &Path, to: &Path) {
    fs::create_dir_all(to).expect("a directory to copy to");
    for entry in fs::read_dir(from).expect("a directory to copy") {
        let entry = entry.expect("its entries");
        let target = to.join(entry.file_name());
        if entry.path().is_dir() {
            copy_directory(&entry.path(), &target);
        } else {
            fs::copy(entry.path(), target).expect("a file to copy");
        }
    }
}
