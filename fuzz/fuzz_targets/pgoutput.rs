//! The decoder of pgoutput: no panic, and everything it hands out can be walked.
#![no_main]

use libfuzzer_sys::fuzz_target;
use pgoutput::{Message, OldTuple, decode};

fuzz_target!(|bytes: &[u8]| {
    let walk = |tuple: change::Tuple<'_>| assert_eq!(tuple.iter().count(), tuple.len());
    match decode(bytes) {
        Ok(Message::Insert { new, .. }) => walk(new),
        Ok(Message::Update { old, new, .. }) => {
            old.map(OldTuple::tuple).into_iter().for_each(walk);
            walk(new);
        }
        Ok(Message::Delete { old, .. }) => walk(old.tuple()),
        Ok(Message::Relation(relation)) => {
            assert_eq!(relation.columns.iter().count(), relation.columns.len());
        }
        Ok(Message::Truncate { relations, .. }) => assert!(relations.iter().len() * 4 < bytes.len()),
        _ => {}
    }
});
