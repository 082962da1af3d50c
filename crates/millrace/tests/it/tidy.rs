//! The rules of the codemap that can be checked.

use std::collections::BTreeMap;

use cargo_metadata::{DependencyKind, MetadataCommand};

/// What each crate may depend on, of ours. `crates/README.md` says why.
fn allowed() -> BTreeMap<&'static str, &'static [&'static str]> {
    BTreeMap::from([
        ("millrace-change", &[][..]),
        ("millrace-pgoutput", &["millrace-change"]),
        ("millrace-relay", &["millrace-change"]),
        ("millrace-worker", &["millrace-change"]),
        ("millrace-postgres", &["millrace-change", "millrace-pgoutput", "millrace-relay"]),
        ("millrace-kafka", &["millrace-change", "millrace-relay", "millrace-worker"]),
        ("millrace-redis-counters", &["millrace-change", "millrace-worker"]),
        ("millrace-tantivy-search", &["millrace-change", "millrace-worker"]),
    ])
}

#[test]
fn crates_depend_only_on_what_the_codemap_allows() {
    let metadata = MetadataCommand::new().no_deps().exec().expect("cargo metadata");
    let allowed = allowed();
    let mut seen = 0;
    for package in &metadata.packages {
        let ours = package.dependencies.iter().filter(|dependency| {
            dependency.kind == DependencyKind::Normal && dependency.name.starts_with("millrace")
        });
        for dependency in ours {
            assert_ne!(dependency.name, "millrace", "{} depends on the binary", package.name);
            if let Some(allowed) = allowed.get(package.name.as_str()) {
                assert!(
                    allowed.contains(&dependency.name.as_str()),
                    "{} depends on {}",
                    package.name,
                    dependency.name
                );
            }
        }
        seen += usize::from(allowed.contains_key(package.name.as_str()));
    }
    assert_eq!(seen, allowed.len(), "every crate of the table exists");
}

#[test]
fn only_the_kafka_adapter_knows_rdkafka() {
    let metadata = MetadataCommand::new().no_deps().exec().expect("cargo metadata");
    for package in &metadata.packages {
        let uses = package.dependencies.iter().any(|dependency| dependency.name == "rdkafka");
        let may = ["millrace-kafka", "millrace-testkit", "millrace-bench"].contains(&package.name.as_str());
        assert!(!uses || may, "{} depends on rdkafka", package.name);
    }
}
