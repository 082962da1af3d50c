//! Brokers that go from one test to the next: starting one takes longer than most tests need.

use std::collections::VecDeque;
use std::ops::{Deref, DerefMut};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rdkafka::ClientConfig;
use rdkafka::admin::{AdminClient, AdminOptions};
use rdkafka::client::DefaultClientContext;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::error::KafkaResult;
use rdkafka::types::RDKafkaErrorCode;

use super::Kafka;

/// Longest wait for one of a broker's answers.
const PATIENCE: Duration = Duration::from_secs(20);

/// Brokers that no test has now, those that came back first in front.
static IDLE: Mutex<VecDeque<Kafka>> = Mutex::new(VecDeque::new());

fn idle() -> MutexGuard<'static, VecDeque<Kafka>> {
    IDLE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A broker without topics and groups. When this value is dropped another test can have it, unless it was borrowed
/// mutably or the test failed: it may be damaged then.
#[derive(Debug)]
pub struct LentKafka {
    kafka: Option<Kafka>,
    harmed: bool,
}

impl LentKafka {
    /// One that another test has left, or a new one.
    ///
    /// # Panics
    /// As [`Kafka::start`] does.
    pub fn lend() -> Self {
        let mut busy = Vec::new();
        let found = loop {
            let Some(kafka) = idle().pop_front() else { break None };
            match emptied(&kafka) {
                Ok(true) => break Some(kafka),
                Ok(false) => busy.push(kafka),
                // It ends here.
                Err(_) => {}
            }
        };
        idle().extend(busy);
        LentKafka { kafka: Some(found.unwrap_or_else(Kafka::start)), harmed: false }
    }
}

impl Deref for LentKafka {
    type Target = Kafka;

    fn deref(&self) -> &Kafka {
        self.kafka.as_ref().expect("it is there until the drop")
    }
}

impl DerefMut for LentKafka {
    fn deref_mut(&mut self) -> &mut Kafka {
        self.harmed = true;
        self.kafka.as_mut().expect("it is there until the drop")
    }
}

impl Drop for LentKafka {
    fn drop(&mut self) {
        if !self.harmed && !std::thread::panicking() {
            idle().extend(self.kafka.take());
        }
    }
}

/// Takes all from a broker that tests have put there. `false` while a group waits for members that were killed.
fn emptied(kafka: &Kafka) -> KafkaResult<bool> {
    let mut config = ClientConfig::new();
    config.set("bootstrap.servers", kafka.bootstrap());
    let client: BaseConsumer = config.create()?;
    let groups = client.fetch_group_list(None, PATIENCE)?;
    let groups: Vec<&str> = groups.groups().iter().map(|group| group.name()).collect();
    let metadata = client.fetch_metadata(None, PATIENCE)?;
    let names = metadata.topics().iter().map(|topic| topic.name());
    let topics: Vec<&str> = names.filter(|name| !name.starts_with("__")).collect();
    let admin: AdminClient<DefaultClientContext> = config.create()?;
    let options = AdminOptions::new().operation_timeout(Some(PATIENCE));
    let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
    if !groups.is_empty() {
        for deleted in runtime.block_on(admin.delete_groups(&groups, &options))? {
            match deleted {
                Ok(_) | Err((_, RDKafkaErrorCode::GroupIdNotFound)) => {}
                Err(_) => return Ok(false),
            }
        }
    }
    // The end of a transaction that its writer left open would be written to the next topic of that name.
    for log in topics.iter().filter(|topic| topic.starts_with("millrace.")) {
        kafka.try_fence(log)?;
        kafka.try_fence(&format!("{log}.turn"))?;
    }
    if !topics.is_empty() {
        for deleted in runtime.block_on(admin.delete_topics(&topics, &options))? {
            deleted.map_err(|(_, code)| rdkafka::error::KafkaError::AdminOp(code))?;
        }
    }
    Ok(true)
}
