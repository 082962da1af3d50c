use std::ffi::OsString;
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use rdkafka::ClientConfig;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::error::KafkaResult;
use rdkafka::message::{Header, OwnedHeaders};
use rdkafka::producer::{BaseProducer, BaseRecord, Producer};
use tempfile::TempDir;

use super::{Process, free_port};

/// The version that `scripts/install` brings.
const VERSION: &str = "4.1.0";
/// A broker on a busy machine is up in this time, or never.
const START_DEADLINE: Duration = Duration::from_secs(60);
/// Another process may take a free port before the broker does.
const START_ATTEMPTS: usize = 3;

/// A real single-node Kafka (KRaft) on free ports, with its data in a temporary directory.
///
/// It ends with this value, and also with the test process should that die before it drops the value (a `static`
/// is never dropped).
#[derive(Debug)]
pub struct Kafka {
    process: Option<Process>,
    reaper: Reaper,
    broker_port: u16,
    controller_port: u16,
    directory: TempDir,
    jvm: Jvm,
    /// Name and port of the listeners beside the plain one.
    listeners: Vec<(&'static str, u16)>,
}

/// How a Java program is run: to start at once in little memory, or as a server is.
#[derive(Clone, Copy, Debug)]
pub(super) struct Jvm {
    heap_megabytes: u32,
    server: bool,
}

impl Jvm {
    pub(super) fn small(heap_megabytes: u32) -> Self {
        Jvm { heap_megabytes, server: false }
    }

    pub(super) fn server(heap_megabytes: u32) -> Self {
        Jvm { heap_megabytes, server: true }
    }
}

impl Kafka {
    /// Starts a broker and returns when it answers.
    ///
    /// # Panics
    /// When its jars are not there, or it does not come up.
    pub fn start() -> Self {
        Self::start_in(Jvm::small(512), &[], |_| String::new())
    }

    /// The same with memory and compilers as a server has them.
    ///
    /// # Panics
    /// When its jars are not there, or it does not come up.
    pub fn tuned() -> Self {
        Self::start_in(Jvm::server(1024), &[], |_| String::new())
    }

    /// The same as [`start`](Self::start) with more listeners, which are named by their protocol (`SASL_SSL`), and with
    /// the properties that those need, which may be files in the broker's directory.
    ///
    /// # Panics
    /// When its jars are not there, or it does not come up.
    pub fn secured(listeners: &[&'static str], properties: impl Fn(&Path) -> String) -> Self {
        Self::start_in(Jvm::small(512), listeners, properties)
    }

    fn start_in(jvm: Jvm, listeners: &[&'static str], properties: impl Fn(&Path) -> String) -> Self {
        for _ in 0..START_ATTEMPTS {
            let directory = tempfile::Builder::new()
                .prefix("millrace-kafka-")
                .tempdir()
                .expect("a temporary directory can be made");
            let mut kafka = Kafka {
                process: None,
                reaper: Reaper::of(directory.path()),
                broker_port: free_port(),
                controller_port: free_port(),
                directory,
                jvm,
                listeners: listeners.iter().map(|name| (*name, free_port())).collect(),
            };
            let more = properties(kafka.directory.path());
            kafka.write_properties(&more);
            kafka.format();
            if kafka.run() {
                return kafka;
            }
        }
        panic!("Kafka ended {START_ATTEMPTS} times right after its start");
    }

    /// `host:port`, for `bootstrap.servers`.
    pub fn bootstrap(&self) -> String {
        format!("127.0.0.1:{}", self.broker_port)
    }

    /// `host:port` of one of the [further listeners](Self::secured).
    ///
    /// # Panics
    /// When there is none of that name.
    pub fn listener(&self, host: &str, name: &str) -> String {
        let (_, port) =
            self.listeners.iter().find(|(found, _)| *found == name).expect("a listener of that name");
        format!("{host}:{port}")
    }

    /// Where its files are.
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// The broker's process id.
    ///
    /// # Panics
    /// When it was killed.
    pub fn id(&self) -> u32 {
        self.process.as_ref().expect("the broker runs").id()
    }

    pub(super) fn runs(&self) -> bool {
        self.process.is_some()
    }

    /// kill -9; the data stay.
    pub fn kill(&mut self) {
        // In this order: the reaper must never kill a stranger that got the id anew.
        self.reaper.watch(None);
        if let Some(mut process) = self.process.take() {
            process.kill();
        }
    }

    /// kill -9 if it runs, and starts it again on the same ports and data; returns when it answers.
    ///
    /// # Panics
    /// When it does not come up.
    pub fn restart(&mut self) {
        self.kill();
        assert!(self.run(), "Kafka ended right after its restart:\n{}", self.log());
    }

    /// Stops it in its tracks, connections open (SIGSTOP).
    pub fn pause(&mut self) {
        if let Some(process) = &self.process {
            process.signal("STOP");
        }
    }

    /// Ends a [`Kafka::pause`] (SIGCONT).
    pub fn resume(&mut self) {
        if let Some(process) = &self.process {
            process.signal("CONT");
        }
    }

    /// Runs one of Kafka's command-line tools by its class and returns what it printed, errors after the rest:
    /// `tool("org.apache.kafka.tools.consumer.group.ConsumerGroupCommand", &["--bootstrap-server", ..., "--list"])`.
    ///
    /// # Panics
    /// When it exits with anything but 0.
    pub fn tool(&self, class: &str, args: &[&str]) -> String {
        let output = kafka_java(Jvm::small(128)).arg(class).args(args).output().expect("java can be started");
        let mut text = String::from_utf8_lossy(&output.stdout).into_owned();
        text.push_str(&String::from_utf8_lossy(&output.stderr));
        assert!(output.status.success(), "{class} {args:?} failed: {text}");
        text
    }

    /// Makes a topic of one partition.
    ///
    /// # Panics
    /// When the broker does not.
    pub fn make_topic(&self, name: &str) {
        let (class, bootstrap) = ("org.apache.kafka.tools.TopicCommand", self.bootstrap());
        let place = ["--bootstrap-server", &bootstrap, "--create", "--topic", name];
        self.tool(class, &[&place[..], &["--partitions", "1"]].concat());
    }

    /// Appends a record to partition 0 of a topic, as a program does that has no business there.
    ///
    /// # Panics
    /// When the broker does not take it.
    pub fn append(&self, topic: &str, key: &str, value: &str, headers: &[(&str, &str)]) {
        let producer: BaseProducer =
            ClientConfig::new().set("bootstrap.servers", self.bootstrap()).create().expect("a producer");
        let mut all = OwnedHeaders::new();
        for &(key, value) in headers {
            all = all.insert(Header { key, value: Some(value) });
        }
        let record = BaseRecord::to(topic).partition(0).key(key).payload(value).headers(all);
        producer.send(record).map_err(|(error, _)| error).expect("room for one record");
        producer.flush(START_DEADLINE).expect("the broker takes it");
    }

    /// Fences whoever writes under a `transactional.id`, as a newer writer does.
    ///
    /// # Panics
    /// When the broker does not answer.
    pub fn fence(&self, transactional_id: &str) {
        self.try_fence(transactional_id).expect("the broker fences");
    }

    /// The same, for a broker that may be out of order.
    pub(super) fn try_fence(&self, transactional_id: &str) -> KafkaResult<()> {
        let mut config = ClientConfig::new();
        config.set("bootstrap.servers", self.bootstrap()).set("transactional.id", transactional_id);
        config.create::<BaseProducer>()?.init_transactions(START_DEADLINE)
    }

    /// What the broker has logged (warnings and errors), for a test's failure message.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.path("broker.log")).unwrap_or_default()
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn write_properties(&self, more: &str) {
        let Kafka { broker_port, controller_port, .. } = self;
        let further: String =
            self.listeners.iter().map(|(name, port)| format!(",{name}://localhost:{port}")).collect();
        let data = self.path("data");
        let text = format!(
            "process.roles=broker,controller\n\
             node.id=1\n\
             controller.quorum.voters=1@127.0.0.1:{controller_port}\n\
             listeners=PLAINTEXT://127.0.0.1:{broker_port},CONTROLLER://127.0.0.1:{controller_port}{further}\n\
             advertised.listeners=PLAINTEXT://127.0.0.1:{broker_port}{further}\n\
             controller.listener.names=CONTROLLER\n\
             listener.security.protocol.map=CONTROLLER:PLAINTEXT,PLAINTEXT:PLAINTEXT,SSL:SSL,SASL_SSL:SASL_SSL\n\
             log.dirs={}\n\
             auto.create.topics.enable=false\n\
             broker.heartbeat.interval.ms=500\n\
             broker.session.timeout.ms=2000\n\
             default.replication.factor=1\n\
             group.initial.rebalance.delay.ms=0\n\
             group.min.session.timeout.ms=500\n\
             log.cleaner.dedupe.buffer.size=4194304\n\
             num.io.threads=4\n\
             num.network.threads=2\n\
             offsets.topic.num.partitions=1\n\
             offsets.topic.replication.factor=1\n\
             transaction.abort.timed.out.transaction.cleanup.interval.ms=500\n\
             transaction.state.log.min.isr=1\n\
             transaction.state.log.num.partitions=1\n\
             transaction.state.log.replication.factor=1\n\
             {more}",
            data.display(),
        );
        std::fs::write(self.path("server.properties"), text).expect("the temporary directory can be written");
    }

    /// Formats the storage. What the tool writes is the same for every broker, and it takes seconds.
    fn format(&self) {
        static FORMATTED: OnceLock<Vec<(OsString, Vec<u8>)>> = OnceLock::new();
        let data = self.path("data");
        let files = FORMATTED.get_or_init(|| {
            self.format_by_tool();
            let files = fs::read_dir(&data).expect("the tool has made it").map(|file| {
                let file = file.expect("our own directory");
                (file.file_name(), fs::read(file.path()).expect("our own file"))
            });
            files.collect()
        });
        fs::create_dir_all(&data).expect("the temporary directory can be written");
        for (name, content) in files {
            fs::write(data.join(name), content).expect("the temporary directory can be written");
        }
    }

    fn format_by_tool(&self) {
        let output = kafka_java(Jvm::small(128))
            .args(["kafka.tools.StorageTool", "format", "-t", "bWlsbHJhY2UtdGVzdC0tLQ", "-c"])
            .arg(self.path("server.properties"))
            .output()
            .expect("java can be started");
        assert!(
            output.status.success(),
            "Kafka's storage cannot be formatted: {}",
            String::from_utf8_lossy(&output.stderr)
        );
    }

    /// Starts the process; `false` when it ended before it answered.
    fn run(&mut self) -> bool {
        let log = File::options().create(true).append(true).open(self.path("broker.log"));
        let log = log.expect("the temporary directory can be written");
        let mut command = kafka_java(self.jvm);
        command.arg("kafka.Kafka").arg(self.path("server.properties")).stdin(Stdio::null());
        command.stdout(log.try_clone().expect("a file handle can be copied")).stderr(log);
        let mut process = Process::spawn(&mut command);
        self.reaper.watch(Some(process.id()));
        let up = self.wait_until_up(&mut process);
        if up {
            self.process = Some(process);
        } else {
            self.reaper.watch(None);
        }
        up
    }

    fn wait_until_up(&self, process: &mut Process) -> bool {
        let client: BaseConsumer = ClientConfig::new()
            .set("bootstrap.servers", self.bootstrap())
            .set("reconnect.backoff.ms", "20")
            .set("reconnect.backoff.max.ms", "100")
            // A refused connection is what we wait to see the end of.
            .set("log_level", "0")
            .create()
            .expect("these are librdkafka's properties");
        let start = Instant::now();
        loop {
            if process.ended().is_some() {
                return false;
            }
            let answer = client.fetch_metadata(None, Duration::from_millis(500));
            if answer.is_ok_and(|metadata| !metadata.brokers().is_empty()) {
                return true;
            }
            assert!(
                start.elapsed() < START_DEADLINE,
                "Kafka is not up after {START_DEADLINE:?}:\n{}",
                self.log()
            );
        }
    }
}

impl Drop for Kafka {
    fn drop(&mut self) {
        self.kill();
    }
}

/// `java`, with a heap of so many megabytes, the jars of a directory, and logging down to warnings.
pub(super) fn java(jvm: Jvm, libs: &Path) -> Command {
    let mut command = Command::new("java");
    if !jvm.server {
        command.args(["-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC"]);
    }
    command
        .arg(format!("-Xmx{}m", jvm.heap_megabytes))
        .arg("-XX:-UsePerfData")
        .arg("-Dorg.slf4j.simpleLogger.defaultLogLevel=warn")
        .args(["-cp", &format!("{}/*", libs.display())]);
    command
}

pub(super) fn kafka_java(jvm: Jvm) -> Command {
    java(jvm, &libraries("kafka", VERSION, &format!("kafka_2.13-{VERSION}.jar")))
}

/// Where things are kept that every run needs.
pub(super) fn cache() -> PathBuf {
    let home = || PathBuf::from(std::env::var_os("HOME").unwrap_or_default()).join(".cache");
    std::env::var_os("XDG_CACHE_HOME").map_or_else(home, PathBuf::from).join("millrace")
}

/// Where `scripts/install` puts the jars of a program; `jar` is the one it puts there last.
pub(super) fn libraries(program: &str, version: &str, jar: &str) -> PathBuf {
    let chosen = std::env::var_os(format!("MILLRACE_{}_LIBS", program.to_uppercase()));
    let libs = chosen.map_or_else(|| cache().join(format!("{program}-{version}")), PathBuf::from);
    let jar = libs.join(jar);
    assert!(jar.exists(), "{} is not there: run scripts/install (--debezium for Debezium)", jar.display());
    libs
}

/// A shell that outlives the test process by a moment: when its standard input ends, it kills the process whose id
/// it read last and removes the directory.
#[derive(Debug)]
pub(super) struct Reaper {
    shell: Child,
    line: Option<ChildStdin>,
}

impl Reaper {
    pub(super) fn of(directory: &Path) -> Self {
        let script = r#"trap '' INT TERM HUP; while read id; do last=$id; done; [ -z "$last" ] || kill -9 "$last"; rm -rf "$0""#;
        let mut shell = Command::new("sh")
            .args(["-c", script])
            .arg(directory)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("sh can be started");
        let line = shell.stdin.take();
        Reaper { shell, line }
    }

    /// What to kill; `None` for nothing.
    pub(super) fn watch(&mut self, id: Option<u32>) {
        let line = self.line.as_mut().expect("the line is open until the drop");
        let id = id.map(|id| id.to_string()).unwrap_or_default();
        writeln!(line, "{id}").expect("the reaper reads");
    }
}

impl Drop for Reaper {
    fn drop(&mut self) {
        self.line = None;
        // Its end is awaited so that no zombie stays; how it ended does not matter.
        let _ = self.shell.wait();
    }
}
