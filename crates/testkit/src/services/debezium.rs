use std::fs::{self, File};
use std::process::Stdio;

use tempfile::TempDir;

use super::kafka::{Jvm, Reaper, java, libraries};
use super::{Kafka, Postgres, Process};

/// The version that `scripts/install --debezium` brings.
const VERSION: &str = "3.3.1.Final";

/// A running Debezium Postgres connector in a Kafka Connect of its own. It ends as [`Kafka`] does.
#[derive(Debug)]
pub struct Debezium {
    process: Process,
    reaper: Reaper,
    directory: TempDir,
}

impl Debezium {
    /// Starts a connector that reads `database` and writes to `kafka`, with what `properties` add to the connector's
    /// own. It streams some seconds later, when its slot is active.
    ///
    /// # Panics
    /// When its jars are not there.
    pub fn start(kafka: &Kafka, postgres: &Postgres, database: &str, properties: &str) -> Self {
        Self::start_in(Jvm::small(512), kafka, postgres, database, properties)
    }

    /// The same with memory and compilers as a server has them.
    ///
    /// # Panics
    /// When its jars are not there.
    pub fn tuned(kafka: &Kafka, postgres: &Postgres, database: &str, properties: &str) -> Self {
        Self::start_in(Jvm::server(2048), kafka, postgres, database, properties)
    }

    fn start_in(jvm: Jvm, kafka: &Kafka, postgres: &Postgres, database: &str, properties: &str) -> Self {
        let directory = tempfile::Builder::new().prefix("millrace-debezium-").tempdir();
        let directory = directory.expect("a temporary directory can be made");
        let path = |name: &str| directory.path().join(name);
        let write = |name: &str, text: String| fs::write(path(name), text).expect("our own directory");
        write(
            "worker.properties",
            format!(
                "bootstrap.servers={}\n\
                 listeners=HTTP://127.0.0.1:0\n\
                 offset.storage.file.filename={}\n\
                 key.converter=org.apache.kafka.connect.json.JsonConverter\n\
                 key.converter.schemas.enable=false\n\
                 value.converter=org.apache.kafka.connect.json.JsonConverter\n\
                 value.converter.schemas.enable=false\n",
                kafka.bootstrap(),
                path("offsets").display(),
            ),
        );
        write(
            "connector.properties",
            format!(
                "name=debezium\n\
                 connector.class=io.debezium.connector.postgresql.PostgresConnector\n\
                 tasks.max=1\n\
                 database.hostname=127.0.0.1\n\
                 database.port={}\n\
                 database.user=postgres\n\
                 database.dbname={database}\n\
                 plugin.name=pgoutput\n\
                 {properties}",
                postgres.port(),
            ),
        );
        let libs = libraries("debezium", VERSION, &format!("debezium-connector-postgres-{VERSION}.jar"));
        let log = File::create(path("log")).expect("our own directory");
        let mut command = java(jvm, &libs);
        command
            .arg("org.apache.kafka.connect.cli.ConnectStandalone")
            .args([path("worker.properties"), path("connector.properties")])
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("a file handle can be copied"))
            .stderr(log);
        let mut reaper = Reaper::of(directory.path());
        let process = Process::spawn(&mut command);
        reaper.watch(Some(process.id()));
        Debezium { process, reaper, directory }
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.process.id()
    }

    /// What it has logged (warnings and errors), for a test's failure message.
    pub fn log(&self) -> String {
        fs::read_to_string(self.directory.path().join("log")).unwrap_or_default()
    }
}

impl Drop for Debezium {
    fn drop(&mut self) {
        self.reaper.watch(None);
        self.process.kill();
    }
}
