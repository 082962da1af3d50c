//! Several Kafka brokers with a controller of their own, each of which can be frozen, or cut off from the controller.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::path::Path;
use std::process::Stdio;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rdkafka::ClientConfig;
use rdkafka::consumer::{BaseConsumer, Consumer};
use tempfile::TempDir;

use super::kafka::{Jvm, Reaper, kafka_java};
use super::{Process, free_port, wait_until};

/// Number of the controller; brokers are numbered from 1 on.
const CONTROLLER: usize = 100;
/// Its name, which each broker resolves to the address of its own door: brokers turn to the name that the controller
/// tells, whatever they were configured with.
const CONTROLLER_HOST: &str = "controller";
/// Brokers on a busy machine are up in this time, or never.
const START_DEADLINE: Duration = Duration::from_secs(90);
const ANSWER: Duration = Duration::from_millis(500);

/// Brokers that keep replicas of each other's partitions (KRaft), on free ports, with their data in temporary
/// directories. They end with this value, and with the test process.
///
/// The controller takes a broker that it does not hear from for two seconds for dead, and has others lead.
#[derive(Debug)]
pub struct KafkaCluster {
    brokers: Vec<Broker>,
    _controller: Node,
}

#[derive(Debug)]
struct Broker {
    node: Node,
    port: u16,
    door: Door,
}

impl KafkaCluster {
    /// Starts so many brokers and returns when all of them answer.
    ///
    /// # Panics
    /// When Kafka's jars are not there, or a broker does not come up.
    pub fn start(brokers: usize) -> Self {
        let port = free_port();
        let listener = format!(
            "listeners=CONTROLLER://127.0.0.1:{port}\nadvertised.listeners=CONTROLLER://{CONTROLLER_HOST}:{port}"
        );
        let mut controller = Node::new(CONTROLLER, "controller", port, &listener);
        let formatted = controller.format();
        controller.run("127.0.0.1");
        let brokers = (1..=brokers).map(|id| Broker::start(id, port, &formatted)).collect();
        let cluster = KafkaCluster { brokers, _controller: controller };
        cluster.wait_until_up();
        cluster
    }

    /// `host:port,...` of these brokers.
    pub fn bootstrap(&self, ids: &[usize]) -> String {
        let addresses = ids.iter().map(|id| format!("127.0.0.1:{}", self.broker(*id).port));
        addresses.collect::<Vec<_>>().join(",")
    }

    /// The broker that leads partition 0 of a topic, by what this broker says.
    ///
    /// # Panics
    /// When that one does not say.
    pub fn leader(&self, topic: &str, by: usize) -> usize {
        let port = self.broker(by).port;
        wait_until(&format!("broker {by} names a leader of {topic}"), START_DEADLINE, || {
            let leader = named_leader(port, topic).ok().flatten()?;
            usize::try_from(leader).ok()
        })
    }

    /// Stops a broker in its tracks (SIGSTOP), connections open.
    pub fn pause(&self, id: usize) {
        self.broker(id).node.signal("STOP");
    }

    /// Ends a [`pause`](Self::pause) (SIGCONT).
    pub fn resume(&self, id: usize) {
        self.broker(id).node.signal("CONT");
    }

    /// Cuts a broker off from the controller, and from nobody else: it goes on as it is and learns of nothing.
    pub fn cut_off(&self, id: usize) {
        self.broker(id).door.shut(true);
    }

    /// Ends a [`cut_off`](Self::cut_off).
    pub fn let_in(&self, id: usize) {
        self.broker(id).door.shut(false);
    }

    fn broker(&self, id: usize) -> &Broker {
        &self.brokers[id - 1]
    }

    fn wait_until_up(&self) {
        let start = Instant::now();
        let known = |broker: &Broker| {
            let metadata = client(&format!("127.0.0.1:{}", broker.port)).fetch_metadata(None, ANSWER);
            metadata.is_ok_and(|metadata| metadata.brokers().len() == self.brokers.len())
        };
        while !self.brokers.iter().all(known) {
            assert!(start.elapsed() < START_DEADLINE, "Kafka's brokers are not up: {}", self.log());
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    /// What the brokers have logged (warnings and errors), for a test's failure message.
    pub fn log(&self) -> String {
        self.brokers.iter().map(|broker| broker.node.log()).collect()
    }
}

/// Asks one broker, and no other, who leads partition 0 of a topic (Kafka's Metadata request, version 1). A client
/// library would ask whichever broker it likes.
fn named_leader(port: u16, topic: &str) -> io::Result<Option<i32>> {
    let mut stream = TcpStream::connect(("127.0.0.1", port))?;
    stream.set_read_timeout(Some(ANSWER))?;
    let mut request = Vec::new();
    // Metadata, version 1, correlation id, no client id, one topic.
    request.extend([0, 3, 0, 1, 0, 0, 0, 7, 0xff, 0xff, 0, 0, 0, 1]);
    request.extend((topic.len() as u16).to_be_bytes());
    request.extend(topic.as_bytes());
    stream.write_all(&(request.len() as u32).to_be_bytes())?;
    stream.write_all(&request)?;
    let mut len = [0; 4];
    stream.read_exact(&mut len)?;
    let mut answer = vec![0; u32::from_be_bytes(len) as usize];
    stream.read_exact(&mut answer)?;
    let mut answer = Answer(&answer[4..]);
    Ok(answer.leader())
}

/// What is left of the answer to a Metadata request.
struct Answer<'a>(&'a [u8]);

impl Answer<'_> {
    fn leader(&mut self) -> Option<i32> {
        for _ in 0..self.int()? {
            // Node, host, port, rack.
            self.int()?;
            self.text()?;
            self.int()?;
            self.text()?;
        }
        // Controller, one topic: error, name, internal or not; its first partition: error, number, leader.
        self.skip(4 + 4 + 2)?;
        self.text()?;
        self.skip(1 + 4 + 2 + 4)?;
        self.int()
    }

    fn skip(&mut self, len: usize) -> Option<()> {
        self.0 = self.0.get(len..)?;
        Some(())
    }

    fn int(&mut self) -> Option<i32> {
        let (int, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(i32::from_be_bytes(*int))
    }

    fn text(&mut self) -> Option<()> {
        let (len, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        // -1 for none.
        self.skip(usize::try_from(i16::from_be_bytes(*len)).unwrap_or(0))
    }
}

fn client(bootstrap: &str) -> BaseConsumer {
    ClientConfig::new()
        .set("bootstrap.servers", bootstrap)
        .set("reconnect.backoff.max.ms", "100")
        // A refused connection is what is waited for to end.
        .set("log_level", "0")
        .create()
        .expect("these are librdkafka's properties")
}

impl Broker {
    fn start(id: usize, controller: u16, formatted: &[(String, String)]) -> Broker {
        let host = format!("127.0.1.{id}");
        let (port, door) = (free_port(), Door::new(&host, controller));
        let listeners = format!(
            "listeners=PLAINTEXT://127.0.0.1:{port}\nadvertised.listeners=PLAINTEXT://127.0.0.1:{port}\n\
             auto.create.topics.enable=false\n\
             auto.leader.rebalance.enable=false\n\
             default.replication.factor=3\n\
             group.initial.rebalance.delay.ms=0\n\
             group.min.session.timeout.ms=500\n\
             log.cleaner.dedupe.buffer.size=4194304\n\
             num.io.threads=2\n\
             num.network.threads=2\n\
             offsets.topic.num.partitions=1\n\
             offsets.topic.replication.factor=3\n\
             transaction.state.log.min.isr=2\n\
             transaction.state.log.num.partitions=1\n\
             transaction.state.log.replication.factor=3"
        );
        let mut node = Node::new(id, "broker", controller, &listeners);
        node.format_as(formatted);
        node.run(&host);
        Broker { node, port, door }
    }
}

/// A process with a role, and its directory.
#[derive(Debug)]
struct Node {
    id: usize,
    process: Option<Process>,
    reaper: Reaper,
    directory: TempDir,
}

impl Node {
    /// One that reaches the controller at this port.
    fn new(id: usize, role: &str, controller: u16, more: &str) -> Node {
        let directory = tempfile::Builder::new().prefix("millrace-kafka-").tempdir();
        let directory = directory.expect("a temporary directory can be made");
        let text = format!(
            "process.roles={role}\n\
             node.id={id}\n\
             controller.quorum.voters={CONTROLLER}@{CONTROLLER_HOST}:{controller}\n\
             controller.listener.names=CONTROLLER\n\
             listener.security.protocol.map=CONTROLLER:PLAINTEXT,PLAINTEXT:PLAINTEXT\n\
             log.dirs={}\n\
             broker.heartbeat.interval.ms=500\n\
             broker.session.timeout.ms=2000\n\
             {more}\n",
            directory.path().join("data").display()
        );
        fs::write(directory.path().join("server.properties"), text).expect("our directory");
        Node { id, process: None, reaper: Reaper::of(directory.path()), directory }
    }

    fn path(&self, name: &str) -> std::path::PathBuf {
        self.directory.path().join(name)
    }

    /// Formats its storage and returns the files.
    fn format(&self) -> Vec<(String, String)> {
        let output = kafka_java(Jvm::small(128))
            .args(["kafka.tools.StorageTool", "format", "-t", "bWlsbHJhY2UtdGVzdC0tLQ", "-c"])
            .arg(self.path("server.properties"))
            .output()
            .expect("java can be started");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let text = |name: &str| fs::read_to_string(self.path("data").join(name)).ok();
        ["meta.properties"].iter().filter_map(|name| Some(((*name).to_owned(), text(name)?))).collect()
    }

    /// The same as another node's, which takes seconds, but for what is its own.
    fn format_as(&self, files: &[(String, String)]) {
        let data = self.path("data");
        fs::create_dir_all(&data).expect("our directory");
        for (name, content) in files {
            let own = |line: &str| match line.split_once('=') {
                Some(("node.id", _)) => format!("node.id={}\n", self.id),
                Some(("directory.id", _)) => format!("directory.id=bWlsbHJhY2UtdGVzdC0t{}A\n", self.id % 10),
                _ => format!("{line}\n"),
            };
            let content: String = content.lines().map(own).collect();
            fs::write(data.join(name), content).expect("our directory");
        }
    }

    /// Starts the process, which is to find the controller at this address.
    fn run(&mut self, controller: &str) {
        let hosts = format!("{controller} {CONTROLLER_HOST}\n127.0.0.1 localhost\n");
        fs::write(self.path("hosts"), hosts).expect("our directory");
        let log = File::options().create(true).append(true).open(self.path("broker.log"));
        let log = log.expect("our directory");
        let mut command = kafka_java(Jvm::small(256));
        command.arg(format!("-Djdk.net.hosts.file={}", self.path("hosts").display()));
        command.arg("kafka.Kafka").arg(self.path("server.properties")).stdin(Stdio::null());
        command.stdout(log.try_clone().expect("a file handle can be copied")).stderr(log);
        let process = Process::spawn(&mut command);
        self.reaper.watch(Some(process.id()));
        self.process = Some(process);
    }

    fn signal(&self, name: &str) {
        if let Some(process) = &self.process {
            process.signal(name);
        }
    }

    fn log(&self) -> String {
        log_of(self.directory.path())
    }
}

fn log_of(directory: &Path) -> String {
    fs::read_to_string(directory.join("broker.log")).unwrap_or_default()
}

impl Drop for Node {
    fn drop(&mut self) {
        // In this order: the reaper must never kill a stranger that got the id anew.
        self.reaper.watch(None);
        if let Some(mut process) = self.process.take() {
            process.kill();
        }
    }
}

/// A way to a port that can be shut: connections through it end, and new ones are not let in.
#[derive(Debug)]
struct Door {
    address: (String, u16),
    state: Arc<DoorState>,
}

#[derive(Debug, Default)]
struct DoorState {
    shut: AtomicBool,
    ended: AtomicBool,
    open: Mutex<Vec<TcpStream>>,
}

impl Door {
    /// A door at this address that leads to the same port at 127.0.0.1.
    fn new(host: &str, port: u16) -> Door {
        let listener = TcpListener::bind((host, port)).expect("a loopback address of its own");
        let address = (host.to_owned(), port);
        let state = Arc::new(DoorState::default());
        let watched = state.clone();
        let accept = move || {
            for stream in listener.incoming().flatten() {
                if watched.ended.load(Ordering::Relaxed) {
                    return;
                }
                // Where it is shut the stream is dropped, which ends it.
                let _ = watched.pass(stream, port);
            }
        };
        std::thread::spawn(accept);
        Door { address, state }
    }

    fn shut(&self, shut: bool) {
        self.state.shut.store(shut, Ordering::SeqCst);
        if shut {
            self.state.end_connections();
        }
    }
}

impl DoorState {
    fn pass(&self, from: TcpStream, port: u16) -> io::Result<()> {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        if self.shut.load(Ordering::SeqCst) {
            return Ok(());
        }
        let to = TcpStream::connect(("127.0.0.1", port))?;
        for (source, sink) in [(&from, &to), (&to, &from)] {
            let (mut source, mut sink) = (source.try_clone()?, sink.try_clone()?);
            std::thread::spawn(move || {
                let _ = io::copy(&mut source, &mut sink);
                let _ = sink.shutdown(Shutdown::Both);
            });
        }
        open.extend([from, to]);
        Ok(())
    }

    fn end_connections(&self) {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        open.drain(..).for_each(|stream| drop(stream.shutdown(Shutdown::Both)));
    }
}

impl Drop for Door {
    fn drop(&mut self) {
        self.state.ended.store(true, Ordering::Relaxed);
        self.state.end_connections();
        // Wakes the thread that accepts.
        let _ = TcpStream::connect((self.address.0.as_str(), self.address.1));
    }
}
