//! What a worker reads of a record: value, key, headers, and the ledger's entries. The first byte chooses.
#![no_main]

use change::{Encoding, Event, Headers, LedgerEntry, fields, header, key_fields};
use libfuzzer_sys::fuzz_target;

const NAMES: &[&str] = &["id", "a", "subject"];

const HEADERS: &[&str] = &[
    header::POSITION,
    header::XID,
    header::SCHEMA,
    header::COMMIT,
    header::LOG,
    header::UNCHANGED,
    header::PREVIOUS_KEY,
];

const ENCODINGS: &[Encoding] = &[
    Encoding::Boolean,
    Encoding::Integer,
    Encoding::Float,
    Encoding::Text,
    Encoding::Date,
    Encoding::Timestamp,
    Encoding::Numeric,
    Encoding::Time,
    Encoding::TimestampTz { digits: 6 },
    Encoding::Bytea,
];

fuzz_target!(|bytes: &[u8]| {
    let Some((choice, bytes)) = bytes.split_first() else { return };
    match choice % 4 {
        0 => event(bytes),
        1 => {
            let _ = key_fields(bytes, NAMES, &mut Vec::new());
        }
        2 => {
            let mut headers = Headers::default();
            let name = HEADERS[usize::from(choice / 4) % HEADERS.len()];
            let _ = headers.read(name, bytes);
        }
        _ => ledger(bytes),
    }
});

fn event(bytes: &[u8]) {
    let Ok(event) = Event::decode(bytes) else { return };
    let mut found = Vec::new();
    for row in [event.before, event.after].into_iter().flatten() {
        let _ = fields(row, NAMES, &mut found);
    }
    for field in &found {
        for encoding in ENCODINGS {
            let _ = field.postgres_text(*encoding);
        }
    }
}

/// An entry that can be read is written and read again as the same.
fn ledger(bytes: &[u8]) {
    let split = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
    let (key, value) = bytes.split_at(split);
    let value = value.get(1..).unwrap_or_default();
    if let Ok(entry) = LedgerEntry::decode(key, value) {
        assert_eq!(LedgerEntry::decode(entry.key().as_bytes(), &entry.value()), Ok(entry));
    }
}
