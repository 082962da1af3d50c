//! What a broker means that does not take a batch of records, and never will.
//!
//! Trying such a batch again does not help, so the writer ends with the setting that lets the broker take it.

use change::Refusal;
use kafka_protocol::ResponseError as Code;

/// Greatest value of a limit in a topic's configuration.
const NO_LIMIT: i64 = i64::MAX;

/// The refusal, if this code does not pass by waiting; `None` for any other. Batches that are too large are not looked
/// at here: what to say of them depends on the records.
pub(super) fn rejection(code: Code, topic: &str) -> Option<Refusal> {
    let remedy = match code {
        Code::InvalidTimestamp => alter(
            topic,
            &format!("message.timestamp.before.max.ms={NO_LIMIT},message.timestamp.after.max.ms={NO_LIMIT}"),
        ),
        Code::InvalidRecord => "run `millrace check`, which names the setting of the topic that forbids the \
                                record (cleanup.policy); if it finds none, the broker's log has the reason"
            .to_owned(),
        Code::PolicyViolation => {
            "a policy that is installed in the brokers forbids the records; its reason is in the \
                                  broker's log. Have it let Millrace write to this topic"
                .to_owned()
        }
        Code::UnsupportedCompressionType => {
            "write `compression.type = \"none\"` into [kafka.properties]".to_owned()
        }
        Code::UnsupportedForMessageFormat => format!(
            "remove message.format.version: kafka-configs.sh --bootstrap-server BROKER --alter --entity-type topics \
             --entity-name {topic} --delete-config message.format.version"
        ),
        Code::InvalidRequiredAcks | Code::UnsupportedVersion => {
            "Millrace needs Kafka 3.6 or later, or a service that keeps to its protocol".to_owned()
        }
        _ => return None,
    };
    Some(Refusal::new(format!("topic \"{topic}\" does not take a batch of records: {code}"), remedy))
}

/// The command that changes a topic's settings.
pub(super) fn alter(topic: &str, settings: &str) -> String {
    format!(
        "kafka-configs.sh --bootstrap-server BROKER --alter --entity-type topics --entity-name {topic} \
         --add-config {settings}"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_does_not_pass_by_waiting_is_refused_with_its_remedy() {
        for (code, remedy) in [
            (Code::InvalidTimestamp, "message.timestamp.before.max.ms=9223372036854775807"),
            (Code::InvalidRecord, "millrace check"),
            (Code::PolicyViolation, "policy"),
            (Code::UnsupportedCompressionType, "compression.type"),
            (Code::UnsupportedForMessageFormat, "--entity-name t --delete-config"),
            (Code::InvalidRequiredAcks, "Kafka 3.6"),
            (Code::UnsupportedVersion, "Kafka 3.6"),
        ] {
            let refusal = rejection(code, "t").unwrap();
            assert!(refusal.remedy.contains(remedy), "{refusal}");
            assert!(refusal.what.starts_with("topic \"t\""), "{refusal}");
        }
    }

    #[test]
    fn what_passes_by_waiting_is_not() {
        for code in [Code::NotLeaderOrFollower, Code::NotEnoughReplicas, Code::RequestTimedOut] {
            assert_eq!(rejection(code, "t"), None, "{code}");
        }
    }
}
