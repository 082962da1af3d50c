//! Random queries of the subset, in every style in which one may write them.

use rand::prelude::*;

use crate::rows::{Family as K, Family, SPECS, Spec, WIDE_NUMERICS, ident, pool, quote};

/// A query as text, and the parts from which the oracle is made.
pub(crate) struct Query {
    pub(crate) sql: String,
    pub(crate) group: Vec<&'static Spec>,
    pub(crate) measured: Option<String>,
    pub(crate) sums: bool,
    pub(crate) from: String,
    pub(crate) condition: String,
    /// The aggregate's place in the select list.
    pub(crate) place: usize,
}

/// Writes random queries, with names, parentheses and cases in every style.
pub(crate) struct Author<'a> {
    pub(crate) rng: &'a mut StdRng,
    pub(crate) alias: Option<&'static str>,
}

impl Author<'_> {
    fn chance(&mut self, probability: f64) -> bool {
        self.rng.random_bool(probability)
    }

    pub(crate) fn query(&mut self) -> Query {
        let from = match self.alias {
            Some(alias) => format!("mails {alias}"),
            None => ["mails", "public.mails", "MAILS", "\"public\".\"mails\""]
                .choose(self.rng)
                .expect("there is one")
                .to_string(),
        };
        let groupable =
            |spec: &&Spec| !matches!(spec.kind, K::Real | K::Double | K::Json) && spec.name != "id";
        let mut candidates: Vec<_> = SPECS.iter().filter(groupable).collect();
        candidates.shuffle(self.rng);
        let group: Vec<_> =
            candidates.into_iter().take([0, 1, 1, 2, 3][self.rng.random_range(0..5)]).collect();
        let (aggregate, measured, sums) = self.aggregate();
        let condition =
            if self.chance(0.93) { format!(" WHERE {}", self.condition(4)) } else { String::new() };

        let mut list: Vec<String> = group.iter().map(|spec| self.column(spec)).collect();
        let place = self.rng.random_range(0..=list.len());
        list.insert(place, if self.chance(0.3) { format!("{aggregate} AS total") } else { aggregate });
        let mut sql = format!("SELECT {} FROM {from}{condition}", list.join(", "));
        if !group.is_empty() {
            let names: Vec<String> = group.iter().map(|spec| self.column(spec)).collect();
            sql += &format!(" GROUP BY {}", names.join(", "));
        }
        Query { sql, group, measured, sums, from, condition, place }
    }

    fn aggregate(&mut self) -> (String, Option<String>, bool) {
        match self.rng.random_range(0..3) {
            0 => ("count(*)".to_owned(), None, false),
            1 => {
                let spec = SPECS.choose(self.rng).expect("there is one");
                (format!("Count({})", self.column(spec)), Some(ident(spec.name)), false)
            }
            _ => {
                let spec = self.of_kinds(&[K::Small, K::Integer, K::Big]);
                (format!("sum({})", self.column(spec)), Some(ident(spec.name)), true)
            }
        }
    }

    fn of_kinds(&mut self, kinds: &[Family]) -> &'static Spec {
        let fitting: Vec<_> = SPECS.iter().filter(|spec| kinds.contains(&spec.kind)).collect();
        fitting.choose(self.rng).expect("there is one")
    }

    /// A reference to a column, in one of the ways to write it.
    fn column(&mut self, spec: &Spec) -> String {
        let plain = spec.name.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit());
        let name = match self.rng.random_range(0..3) {
            0 if plain => spec.name.to_owned(),
            1 if plain => spec.name.to_uppercase(),
            _ => ident(spec.name),
        };
        match (self.alias, self.rng.random_range(0..6)) {
            (Some(alias), 0) => format!("{alias}.{name}"),
            (None, 0) => format!("mails.{name}"),
            (None, 1) => format!("public.mails.{name}"),
            _ => name,
        }
    }

    /// Parts of AND, OR, NOT and IS are put in parentheses or not: any way is a valid query.
    fn part(&mut self, depth: usize) -> String {
        let part = self.condition(depth - 1);
        if self.chance(0.6) { format!("({part})") } else { part }
    }

    fn condition(&mut self, depth: usize) -> String {
        if depth == 0 || self.chance(0.25) {
            return self.comparison();
        }
        match self.rng.random_range(0..7) {
            0 | 1 => format!("{} AND {}", self.part(depth), self.part(depth)),
            2 | 3 => format!("{} or {}", self.part(depth), self.part(depth)),
            4 => format!("NOT {}", self.part(depth)),
            5 => {
                let truth =
                    ["TRUE", "FALSE", "UNKNOWN", "NULL", "NOT TRUE", "not false", "NOT UNKNOWN", "NOT NULL"];
                format!(
                    "({}) IS {}",
                    self.condition(depth - 1),
                    truth.choose(self.rng).expect("there is one")
                )
            }
            _ => self.comparison(),
        }
    }

    fn comparison(&mut self) -> String {
        let spec = SPECS.choose(self.rng).expect("there is one");
        let not = ["", "NOT "].choose(self.rng).expect("there is one");
        let column = self.column(spec);
        match self.rng.random_range(0..12) {
            _ if spec.kind == K::Json => format!("{column} IS {not}NULL"),
            0 => format!("{column} IS {not}NULL"),
            1 => {
                let spec = self.of_kinds(&[K::Boolean]);
                self.column(spec)
            }
            2 => ["TRUE", "false", "NULL"].choose(self.rng).expect("there is one").to_string(),
            3 | 4 if matches!(spec.kind, K::Text | K::Collated | K::Char) => self.like(&column, not),
            5 | 6 if !matches!(spec.kind, K::Real | K::Double) => {
                let list: Vec<_> = (0..self.rng.random_range(1..5)).map(|_| self.literal(spec)).collect();
                format!("{column} {not}IN ({})", list.join(", "))
            }
            7 if spec.kind != K::Collated => {
                let (low, high) = (self.operand(spec), self.operand(spec));
                format!("{column} {not}BETWEEN {low} AND {high}")
            }
            _ => {
                let op = match spec.kind {
                    K::Collated => ["=", "<>"].choose(self.rng),
                    _ => ["=", "<>", "!=", "<", "<=", ">", ">="].choose(self.rng),
                };
                let (op, other) = (op.expect("there is one"), self.operand(spec));
                if self.chance(0.2) {
                    format!("{other} {op} {column}")
                } else {
                    format!("{column} {op} {other}")
                }
            }
        }
    }

    fn like(&mut self, column: &str, not: &str) -> String {
        let pieces =
            ["%", "_", "a", "b", "\\%", "\\_", "\\\\", "é", "!", ":", " ", "日", "'", "!%", "!_", "z"];
        let pattern: String = (0..self.rng.random_range(0..5))
            .map(|_| *pieces.choose(self.rng).expect("there is one"))
            .collect();
        let escape =
            ["", "", " ESCAPE '!'", " ESCAPE ''", " escape '%'"].choose(self.rng).expect("there is one");
        format!("{column} {not}LIKE {}{escape}", quote(&pattern))
    }

    /// The other side: a literal, or a column of the same family.
    fn operand(&mut self, spec: &Spec) -> String {
        if self.chance(0.7) {
            return self.literal(spec);
        }
        let kinds: &[Family] = match spec.kind {
            K::Small | K::Integer | K::Big | K::Numeric => &[K::Small, K::Integer, K::Big, K::Numeric],
            K::Real | K::Double => &[K::Real, K::Double],
            _ => std::slice::from_ref(&spec.kind),
        };
        let other = self.of_kinds(kinds);
        self.column(other)
    }

    fn literal(&mut self, spec: &Spec) -> String {
        if self.chance(0.05) {
            return "NULL".to_owned();
        }
        let text = match spec.kind {
            K::Small | K::Integer | K::Big if self.chance(0.3) => {
                pool(K::Big).choose(self.rng).expect("there is one")
            }
            K::Small | K::Integer | K::Big if self.chance(0.2) => {
                pool(K::Numeric).choose(self.rng).expect("there is one")
            }
            K::Small | K::Integer | K::Big | K::Numeric if self.chance(0.2) => {
                WIDE_NUMERICS.choose(self.rng).expect("there is one")
            }
            kind if self.chance(0.02) => {
                pool([K::Text, K::Big, K::Date][kind as usize % 3]).choose(self.rng).expect("there is one")
            }
            kind => pool(kind).choose(self.rng).expect("there is one"),
        };
        let number = text.starts_with(|c: char| c.is_ascii_digit() || c == '-')
            && text.parse::<f64>().is_ok_and(f64::is_finite);
        let type_name = match spec.kind {
            K::Boolean => "boolean",
            K::Small => "smallint",
            K::Integer => "int4",
            K::Big => "bigint",
            K::Numeric => "numeric",
            K::Real => "real",
            K::Double => "double precision",
            K::Text | K::Collated => "text",
            K::Uuid => "uuid",
            K::Date => "DATE",
            K::Timestamp => ["timestamp", "date"][usize::from(text.len() == 10)],
            K::TimestampTz => {
                ["timestamptz", "timestamp with time zone"].choose(self.rng).expect("there is one")
            }
            K::Char | K::Json => "",
        };
        match self.rng.random_range(0..6) {
            0 if !type_name.is_empty() => format!("{}::{type_name}", quote(text)),
            1 if !type_name.is_empty() => format!("CAST({} AS {type_name})", quote(text)),
            2 if !type_name.is_empty() && !type_name.contains(' ') => format!("{type_name} {}", quote(text)),
            3 if number && !text.starts_with('-') => format!("{text}::{type_name}"),
            3 | 4 if number => (*text).to_owned(),
            _ if spec.kind == K::Boolean => ["TRUE", "false"][usize::from(*text == "f")].to_owned(),
            _ => quote(text),
        }
    }
}
