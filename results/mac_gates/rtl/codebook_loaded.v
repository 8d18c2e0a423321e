// Codebook multiply-accumulate (ADQ) whose level words come in, so that a layer can load its own:
// nothing of the multiplier can be folded into the words. The words are stored outside.
// Lossless accumulator: W = B_A + L + ceil(log2 N).
module codebook_loaded #(
    parameter B_A = 8, parameter B_W = 2, parameter L = 8, parameter N = 576,
    parameter W = B_A + L + $clog2(N)
) (
    input                   clk,
    input                   clear,
    input  [B_A-1:0]        a,
    input  [B_W-1:0]        code,
    input  [L*(1<<B_W)-1:0] words,
    output [W-1:0]          acc
);
    wire [L-1:0] word;
    pick #(.COUNT(1 << B_W), .WIDTH(L)) level (.words(words), .index(code), .word(word));
    uniform_mac #(.B_A(B_A), .B_W(L), .N(N)) mac (
        .clk(clk), .clear(clear), .a(a), .code(word), .acc(acc));
endmodule
