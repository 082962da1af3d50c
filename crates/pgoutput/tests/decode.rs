//! The decoder against bytes made by hand and by an encoder that follows the protocol's page.

use change::{Datum, Lsn, ReplicaIdentity, TupleBuf, TupleError};
use pgoutput::{Column, DecodeError, Message, OldTuple, decode};
use proptest::collection::vec;
use proptest::prelude::*;

/// A message as plain values, from which its bytes are written and with which the decoded one is compared.
#[derive(Clone, Debug)]
enum Plain {
    Begin {
        lsn: u64,
        time: i64,
        xid: u32,
    },
    Commit {
        lsn: u64,
        end: u64,
        time: i64,
    },
    Origin {
        lsn: u64,
        name: String,
    },
    Relation {
        oid: u32,
        namespace: String,
        name: String,
        identity: u8,
        columns: Vec<(bool, String, u32, i32)>,
    },
    Type {
        oid: u32,
        namespace: String,
        name: String,
    },
    Insert {
        relation: u32,
        new: Vec<Value>,
    },
    Update {
        relation: u32,
        old: Option<(bool, Vec<Value>)>,
        new: Vec<Value>,
    },
    Delete {
        relation: u32,
        full: bool,
        old: Vec<Value>,
    },
    Truncate {
        options: u8,
        relations: Vec<u32>,
    },
    Message {
        transactional: bool,
        lsn: u64,
        prefix: String,
        content: Vec<u8>,
    },
}

#[derive(Clone, PartialEq, Debug)]
enum Value {
    Null,
    Unchanged,
    Text(String),
}

const EPOCH_SHIFT: i64 = 946_684_800_000_000;

fn text(out: &mut Vec<u8>, text: &str) {
    out.extend_from_slice(text.as_bytes());
    out.push(0);
}

fn row(out: &mut Vec<u8>, values: &[Value]) {
    out.extend_from_slice(&(values.len() as u16).to_be_bytes());
    for value in values {
        match value {
            Value::Null => out.push(b'n'),
            Value::Unchanged => out.push(b'u'),
            Value::Text(text) => {
                out.push(b't');
                out.extend_from_slice(&(text.len() as u32).to_be_bytes());
                out.extend_from_slice(text.as_bytes());
            }
        }
    }
}

fn encode(message: &Plain) -> Vec<u8> {
    let mut out = Vec::new();
    match message {
        Plain::Begin { lsn, time, xid } => {
            out.push(b'B');
            out.extend(lsn.to_be_bytes());
            out.extend((time - EPOCH_SHIFT).to_be_bytes());
            out.extend(xid.to_be_bytes());
        }
        Plain::Commit { lsn, end, time } => {
            out.extend(b"C\0");
            out.extend(lsn.to_be_bytes());
            out.extend(end.to_be_bytes());
            out.extend((time - EPOCH_SHIFT).to_be_bytes());
        }
        Plain::Origin { lsn, name } => {
            out.push(b'O');
            out.extend(lsn.to_be_bytes());
            text(&mut out, name);
        }
        Plain::Relation { oid, namespace, name, identity, columns } => {
            out.push(b'R');
            out.extend(oid.to_be_bytes());
            text(&mut out, namespace);
            text(&mut out, name);
            out.push(*identity);
            out.extend((columns.len() as u16).to_be_bytes());
            for (key, name, type_oid, modifier) in columns {
                out.push(u8::from(*key));
                text(&mut out, name);
                out.extend(type_oid.to_be_bytes());
                out.extend(modifier.to_be_bytes());
            }
        }
        Plain::Type { oid, namespace, name } => {
            out.push(b'Y');
            out.extend(oid.to_be_bytes());
            text(&mut out, namespace);
            text(&mut out, name);
        }
        Plain::Insert { relation, new } => {
            out.push(b'I');
            out.extend(relation.to_be_bytes());
            out.push(b'N');
            row(&mut out, new);
        }
        Plain::Update { relation, old, new } => {
            out.push(b'U');
            out.extend(relation.to_be_bytes());
            if let Some((full, old)) = old {
                out.push(if *full { b'O' } else { b'K' });
                row(&mut out, old);
            }
            out.push(b'N');
            row(&mut out, new);
        }
        Plain::Delete { relation, full, old } => {
            out.push(b'D');
            out.extend(relation.to_be_bytes());
            out.push(if *full { b'O' } else { b'K' });
            row(&mut out, old);
        }
        Plain::Truncate { options, relations } => {
            out.push(b'T');
            out.extend((relations.len() as u32).to_be_bytes());
            out.push(*options);
            relations.iter().for_each(|oid| out.extend(oid.to_be_bytes()));
        }
        Plain::Message { transactional, lsn, prefix, content } => {
            out.extend([b'M', u8::from(*transactional)]);
            out.extend(lsn.to_be_bytes());
            text(&mut out, prefix);
            out.extend((content.len() as u32).to_be_bytes());
            out.extend(content);
        }
    }
    out
}

fn values(tuple: change::Tuple<'_>) -> Vec<Value> {
    let value = |datum: Datum<'_>| match datum {
        Datum::Null => Value::Null,
        Datum::Unchanged => Value::Unchanged,
        Datum::Text(text) => Value::Text(text.to_owned()),
    };
    tuple.iter().map(value).collect()
}

fn old_values(old: OldTuple<'_>) -> (bool, Vec<Value>) {
    (matches!(old, OldTuple::Full(_)), values(old.tuple()))
}

fn plain(message: Message<'_>) -> Plain {
    match message {
        Message::Begin { commit_lsn, commit_time_us, xid } => {
            Plain::Begin { lsn: commit_lsn.0, time: commit_time_us, xid }
        }
        Message::Commit { commit_lsn, end_lsn, commit_time_us } => {
            Plain::Commit { lsn: commit_lsn.0, end: end_lsn.0, time: commit_time_us }
        }
        Message::Origin { commit_lsn, name } => Plain::Origin { lsn: commit_lsn.0, name: name.into() },
        Message::Relation(relation) => {
            let columns = relation.columns.iter();
            let columns =
                columns.map(|c| (c.key, c.name.into(), c.type_oid, c.type_modifier)).collect::<Vec<_>>();
            assert_eq!(
                (columns.len(), columns.is_empty()),
                (relation.columns.len(), relation.columns.is_empty())
            );
            Plain::Relation {
                oid: relation.oid,
                namespace: relation.namespace.into(),
                name: relation.name.into(),
                identity: match relation.identity {
                    ReplicaIdentity::Default => b'd',
                    ReplicaIdentity::Nothing => b'n',
                    ReplicaIdentity::Full => b'f',
                    ReplicaIdentity::Index => b'i',
                },
                columns,
            }
        }
        Message::Type { oid, namespace, name } => {
            Plain::Type { oid, namespace: namespace.into(), name: name.into() }
        }
        Message::Insert { relation, new } => Plain::Insert { relation, new: values(new) },
        Message::Update { relation, old, new } => {
            Plain::Update { relation, old: old.map(old_values), new: values(new) }
        }
        Message::Delete { relation, old } => {
            let (full, old) = old_values(old);
            Plain::Delete { relation, full, old }
        }
        Message::Truncate { cascade, restart_identity, relations } => Plain::Truncate {
            options: u8::from(cascade) | u8::from(restart_identity) << 1,
            relations: relations.iter().collect(),
        },
        Message::Message { transactional, lsn, prefix, content } => {
            Plain::Message { transactional, lsn: lsn.0, prefix: prefix.into(), content: content.into() }
        }
    }
}

fn any_row() -> impl Strategy<Value = Vec<Value>> {
    let value = prop_oneof![Just(Value::Null), Just(Value::Unchanged), ".{0,12}".prop_map(Value::Text)];
    vec(value, 0..6)
}

fn any_message() -> impl Strategy<Value = Plain> {
    let name = || "[^\\x00]{0,8}";
    let time = i64::MIN / 2..i64::MAX / 2;
    let column = (any::<bool>(), name(), any::<u32>(), any::<i32>());
    let identity = prop_oneof![Just(b'd'), Just(b'n'), Just(b'f'), Just(b'i')];
    prop_oneof![
        (any::<u64>(), time.clone(), any::<u32>()).prop_map(|(lsn, time, xid)| Plain::Begin {
            lsn,
            time,
            xid
        }),
        (any::<u64>(), any::<u64>(), time).prop_map(|(lsn, end, time)| Plain::Commit { lsn, end, time }),
        (any::<u64>(), name()).prop_map(|(lsn, name)| Plain::Origin { lsn, name }),
        (any::<u32>(), name(), name(), identity, vec(column, 0..5)).prop_map(
            |(oid, namespace, name, identity, columns)| {
                Plain::Relation { oid, namespace, name, identity, columns }
            }
        ),
        (any::<u32>(), name(), name()).prop_map(|(oid, namespace, name)| Plain::Type {
            oid,
            namespace,
            name
        }),
        (any::<u32>(), any_row()).prop_map(|(relation, new)| Plain::Insert { relation, new }),
        (any::<u32>(), proptest::option::of((any::<bool>(), any_row())), any_row())
            .prop_map(|(relation, old, new)| Plain::Update { relation, old, new }),
        (any::<u32>(), any::<bool>(), any_row()).prop_map(|(relation, full, old)| Plain::Delete {
            relation,
            full,
            old
        }),
        (0..4u8, vec(any::<u32>(), 0..4))
            .prop_map(|(options, relations)| Plain::Truncate { options, relations }),
        (any::<bool>(), any::<u64>(), name(), vec(any::<u8>(), 0..20)).prop_map(
            |(transactional, lsn, prefix, content)| Plain::Message { transactional, lsn, prefix, content }
        ),
    ]
}

proptest! {
    #[test]
    fn what_is_encoded_is_decoded(message in any_message()) {
        let bytes = encode(&message);
        let decoded = decode(&bytes).map(plain);
        prop_assert_eq!(format!("{decoded:?}"), format!("Ok({message:?})"));
    }

    #[test]
    fn cut_or_lengthened_messages_are_errors(message in any_message(), cut in any::<prop::sample::Index>()) {
        let mut bytes = encode(&message);
        let short = &bytes[..cut.index(bytes.len())];
        prop_assert!(decode(short).is_err());
        bytes.push(0);
        let tag = bytes[0] as char;
        prop_assert_eq!(decode(&bytes), Err(DecodeError::Trailing { tag, extra: 1 }));
    }

    #[test]
    fn no_bytes_make_it_panic(bytes in vec(any::<u8>(), 0..200)) {
        let _ = decode(&bytes).map(plain);
    }

    #[test]
    fn no_damage_makes_it_panic(message in any_message(), at in any::<prop::sample::Index>(), byte: u8) {
        let mut bytes = encode(&message);
        let at = at.index(bytes.len());
        bytes[at] = byte;
        let _ = decode(&bytes).map(plain);
    }
}

#[test]
fn bytes_of_a_real_server() {
    let begin = b"B\0\0\0\0\x01\x6b\x37\x48\0\x02\x8d\x49\x31\x19\x5f\x40\0\0\x02\xe4";
    let commit_time_us = 0x0002_8d49_3119_5f40 + EPOCH_SHIFT;
    assert_eq!(decode(begin), Ok(Message::Begin { commit_lsn: Lsn(0x16b_3748), commit_time_us, xid: 740 }));

    let relation = b"R\0\0\x40\0public\0emails\0d\0\x02\x01id\0\0\0\0\x14\xff\xff\xff\xff\0subject\0\0\0\0\x19\xff\xff\xff\xff";
    let Ok(Message::Relation(relation)) = decode(relation) else { panic!("a relation") };
    assert_eq!((relation.oid, relation.namespace, relation.name), (16384, "public", "emails"));
    assert_eq!(
        relation.columns.iter().collect::<Vec<_>>(),
        [
            Column { key: true, name: "id", type_oid: 20, type_modifier: -1 },
            Column { key: false, name: "subject", type_oid: 25, type_modifier: -1 },
        ]
    );

    let new = TupleBuf::new([Datum::Text("1"), Datum::Unchanged]);
    let old = TupleBuf::new([Datum::Text("2"), Datum::Null]);
    assert_eq!(
        decode(b"U\0\0\x40\0K\0\x02t\0\0\0\x012nN\0\x02t\0\0\0\x011u"),
        Ok(Message::Update {
            relation: 16384,
            old: Some(OldTuple::Key(old.as_tuple())),
            new: new.as_tuple()
        })
    );
}

#[test]
fn what_version_1_does_not_have_is_named() {
    assert_eq!(decode(b""), Err(DecodeError::Empty));
    for tag in *b"SEcAbPKrpX\0" {
        assert_eq!(decode(&[tag, 0, 0]), Err(DecodeError::UnknownTag(tag)));
    }
    let unknown = |tag, what, byte| Err(DecodeError::UnknownByte { tag, what, byte });
    assert_eq!(decode(b"I\0\0\0\x01K\0\0"), unknown('I', "a row of kind", b'K'));
    assert_eq!(decode(b"U\0\0\0\x01K\0\0K\0\0"), unknown('U', "a row of kind", b'K'));
    assert_eq!(decode(b"D\0\0\0\x01N\0\0"), unknown('D', "a row of kind", b'N'));
    assert_eq!(decode(b"C\x01"), unknown('C', "flags", 1));
    assert_eq!(decode(b"M\x02"), unknown('M', "flags", 2));
    assert_eq!(decode(b"T\0\0\0\0\x04"), unknown('T', "options", 4));
    assert_eq!(decode(b"R\0\0\0\x01a\0b\0x\0\0"), unknown('R', "a replica identity", b'x'));
    assert_eq!(decode(b"T\xff\xff\xff\xff\0\0\0\0\x01"), Err(DecodeError::Truncated('T')));
    assert_eq!(decode(b"Y\0\0\0\x01\xff\0b\0"), Err(DecodeError::NotUtf8('Y')));
    let error = TupleError::UnknownKind(b'b');
    assert_eq!(decode(b"I\0\0\0\x01N\0\x01b"), Err(DecodeError::Tuple { tag: 'I', error }));
}
