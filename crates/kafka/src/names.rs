use change::Refusal;

/// The longest pipeline name.
const PIPELINE_MAX_LEN: usize = 32;

/// What one generation of a pipeline is called in Kafka. Other programs rely on these names.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Names {
    pipeline: String,
    generation: u32,
}

impl Names {
    /// The names for this pipeline (`[a-z][a-z0-9_]{0,31}`) and generation (from 1).
    pub fn new(pipeline: &str, generation: u32) -> Result<Self, Refusal> {
        let starts = pipeline.bytes().next().is_some_and(|b| b.is_ascii_lowercase());
        let goes_on = pipeline.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_');
        if !starts || !goes_on || pipeline.len() > PIPELINE_MAX_LEN {
            return Err(Refusal::new(
                format!("`{pipeline}` cannot name a pipeline"),
                format!("use a-z, 0-9 and _, a letter first, at most {PIPELINE_MAX_LEN} characters"),
            ));
        }
        Ok(Names { pipeline: pipeline.to_owned(), generation })
    }

    /// The pipeline.
    pub fn pipeline(&self) -> &str {
        &self.pipeline
    }

    /// The generation.
    pub fn generation(&self) -> u32 {
        self.generation
    }

    /// The log: `millrace.mailbox.1`.
    pub fn log(&self) -> String {
        format!("millrace.{}.{}", self.pipeline, self.generation)
    }

    /// The ledger beside it: `millrace.mailbox.1.ledger`.
    pub fn ledger(&self) -> String {
        format!("{}.ledger", self.log())
    }

    /// Which generation is current: `millrace.mailbox`.
    pub fn generations(&self) -> String {
        format!("millrace.{}", self.pipeline)
    }

    /// What makes a publisher the only one, in the order in which it takes hold of them: `millrace.mailbox.1` and
    /// `millrace.mailbox.1.turn`.
    pub fn transactional_ids(&self) -> [String; 2] {
        [self.log(), format!("{}.turn", self.log())]
    }

    /// The consumer group of a worker: `millrace.mailbox.counters`, with `.NAME` for a further instance.
    pub fn group(&self, worker: &str, instance: Option<&str>) -> String {
        let group = format!("millrace.{}.{worker}", self.pipeline);
        match instance {
            Some(instance) => format!("{group}.{instance}"),
            None => group,
        }
    }

    /// The group under which readers that belong to no group appear: librdkafka asks for a name before it
    /// assigns, though nothing joins it or commits to it.
    pub(crate) fn no_group(&self) -> String {
        format!("millrace.{}.reader", self.pipeline)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_of_the_contract() {
        let names = Names::new("mailbox", 1).unwrap();
        assert_eq!(names.log(), "millrace.mailbox.1");
        assert_eq!(names.ledger(), "millrace.mailbox.1.ledger");
        assert_eq!(names.generations(), "millrace.mailbox");
        assert_eq!(names.transactional_ids(), ["millrace.mailbox.1", "millrace.mailbox.1.turn"]);
        assert_eq!(names.group("counters", None), "millrace.mailbox.counters");
        assert_eq!(names.group("counters", Some("b")), "millrace.mailbox.counters.b");
        for pipeline in ["", "1a", "A", "a-b", "a.b", "_a", "é", &"a".repeat(33)] {
            assert!(Names::new(pipeline, 1).is_err(), "{pipeline}");
        }
        assert!(Names::new(&"a".repeat(32), 1).is_ok());
    }
}
