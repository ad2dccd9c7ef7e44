//! The table as a picture, for a README.

use std::fmt::Write;

use super::CompareReport;

const ROW: usize = 26;
const TOP: usize = 76;
const WIDTH: usize = 960;

/// Where the columns are: work, Lockstep's figure (its right end), the peer's, the peer's name, the bar.
const COLUMNS: [usize; 5] = [16, 400, 490, 504, 680];

/// Widest bar, and the ratio at which it is that wide.
const BAR: (usize, f64) = (200, 5.0);

/// Draws a report as SVG: a line a row, with a bar for the ratio and a mark where both are equal.
pub fn draw(report: &CompareReport, date: &str) -> String {
    let height = TOP + ROW * report.rows.len() + 34;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" \
         font-family=\"sans-serif\" font-size=\"13\">\n<rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n"
    );
    let [work, lockstep, figure, peer, bar] = COLUMNS;
    text(&mut svg, work, 26, "start", "bold", "Lockstep and its peers on the same work");
    for (x, anchor, heading) in [
        (work, "start", "work"),
        (lockstep, "end", "Lockstep"),
        (figure, "end", "peer"),
        (bar, "start", "times as good"),
    ] {
        text(&mut svg, x, TOP - 16, anchor, "bold", heading);
    }
    for (i, row) in report.rows.iter().enumerate() {
        let y = TOP + i * ROW + 8;
        text(&mut svg, work, y, "start", "normal", &format!("{} ({})", row.work, row.unit));
        text(&mut svg, lockstep, y, "end", "normal", &figure_of(row.lockstep));
        text(&mut svg, figure, y, "end", "normal", &figure_of(row.peer_figure));
        text(&mut svg, peer, y, "start", "normal", &row.peer);
        let width = (row.ratio / BAR.1).clamp(0.0, 1.0) * BAR.0 as f64;
        let fill = if row.ratio >= 1.0 { "#2b7a78" } else { "#c8553d" };
        let _ = writeln!(
            svg,
            "<rect x=\"{bar}\" y=\"{}\" width=\"{width:.0}\" height=\"14\" fill=\"{fill}\"/>",
            y - 11
        );
        text(&mut svg, bar + width as usize + 6, y, "start", "bold", &format!("{:.2}", row.ratio));
    }
    let even = bar + (BAR.0 as f64 / BAR.1) as usize;
    let end = TOP + ROW * report.rows.len() - 6;
    let _ =
        writeln!(svg, "<path d=\"M{even} {}V{end}\" stroke=\"black\" stroke-dasharray=\"3 3\"/>", TOP - 8);
    let beside = format!("{date} · {}", report.machine);
    let _ = writeln!(
        svg,
        "<text x=\"{work}\" y=\"{}\" font-size=\"11\" fill=\"#555\">{}</text>",
        height - 12,
        escape(&beside)
    );
    svg.push_str("</svg>\n");
    svg
}

fn text(svg: &mut String, x: usize, y: usize, anchor: &str, weight: &str, said: &str) {
    // Writing into a string does not fail.
    let _ = writeln!(
        svg,
        "<text x=\"{x}\" y=\"{y}\" text-anchor=\"{anchor}\" font-weight=\"{weight}\">{}</text>",
        escape(said)
    );
}

fn figure_of(value: f64) -> String {
    if value < 100.0 { format!("{value:.1}") } else { format!("{value:.0}") }
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::{CompareRow, Machine};

    #[test]
    fn a_picture_has_every_row_and_escapes_what_it_is_given() {
        let row = |work: &str, ratio| CompareRow {
            work: work.into(),
            unit: "tokens/s",
            lockstep: 281.4,
            peer: "PEFT <f32>".into(),
            peer_figure: 16.9,
            ratio,
        };
        let report = CompareReport {
            bench: "compare",
            machine: Machine::here(),
            turns: 1,
            rows: vec![row("training & more", 1.66), row("decode", 0.5), row("far ahead", 40.0)],
            left_out: vec![],
        };
        let svg = draw(&report, "2026-11-24");
        for part in
            ["training &amp; more (tokens/s)", "PEFT &lt;f32&gt;", ">281<", ">16.9<", ">1.66<", ">0.50<"]
        {
            assert!(svg.contains(part), "{part} is not in {svg}");
        }
        assert!(svg.contains("width=\"200\""), "a bar ends somewhere");
        assert_eq!(svg.matches("<rect").count(), 4);
    }
}
