// Decoder of a codebook that can be changed: picks one of 2^B_W words of L bits.
// Stands once a weight lane at the edge of an array, or in each unit; the words are stored outside.
module codebook_decode #(parameter B_W = 4, parameter L = 8) (
    input  [L*(1<<B_W)-1:0] words,
    input  [B_W-1:0]        code,
    output [L-1:0]          word
);
    pick #(.COUNT(1 << B_W), .WIDTH(L)) one (.words(words), .index(code), .word(word));
endmodule
