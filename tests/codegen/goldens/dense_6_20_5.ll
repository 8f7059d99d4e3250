target datalayout = "e-m:e-p270:32:32-p271:32:32-p272:64:64-i64:64-i128:128-f80:128-n8:16:32:64-S128"
target triple = "x86_64-unknown-linux-gnu"

define hidden i32 @dense(ptr %frame, ptr noalias %arg0, ptr noalias %arg1, ptr noalias %arg2) #0 {
entry:
  %buf11 = alloca [16 x float], align 32
  br label %loop1
loop1:
  %i3 = phi i64 [ 0, %entry ], [ %t88, %done5 ]
  br label %loop4
loop4:
  %i6 = phi i64 [ 0, %loop1 ], [ %t86, %join9 ]
  %t7 = icmp slt i64 %i6, 2
  br i1 %t7, label %then8, label %else10
then8:
  store <8 x float> splat (float 0x0000000000000000), ptr %buf11, align 32
  %t12 = getelementptr float, ptr %buf11, i64 8
  store <8 x float> splat (float 0x0000000000000000), ptr %t12, align 32
  br label %loop13
loop13:
  %i15 = phi i64 [ 0, %then8 ], [ %t38, %loop13 ]
  %t16 = mul nsw i64 %i3, 10
  %t17 = add nsw i64 %t16, %i15
  %t18 = getelementptr float, ptr %arg0, i64 %t17
  %t19 = load float, ptr %t18, align 4
  %t20 = mul nsw i64 %i6, 8
  %t21 = mul nsw i64 %i15, 20
  %t22 = add nsw i64 %t20, %t21
  %t23 = getelementptr float, ptr %arg1, i64 %t22
  %t24 = load <8 x float>, ptr %t23, align 4
  %t25 = load <8 x float>, ptr %buf11, align 32
  %t26 = insertelement <8 x float> poison, float %t19, i64 0
  %t27 = shufflevector <8 x float> %t26, <8 x float> poison, <8 x i32> zeroinitializer
  %t28 = call <8 x float> @llvm.fma.v8f32(<8 x float> %t27, <8 x float> %t24, <8 x float> %t25)
  store <8 x float> %t28, ptr %buf11, align 32
  %t29 = getelementptr float, ptr %t18, i64 5
  %t30 = load float, ptr %t29, align 4
  %t31 = load <8 x float>, ptr %t23, align 4
  %t32 = getelementptr float, ptr %buf11, i64 8
  %t33 = load <8 x float>, ptr %t32, align 32
  %t34 = insertelement <8 x float> poison, float %t30, i64 0
  %t35 = shufflevector <8 x float> %t34, <8 x float> poison, <8 x i32> zeroinitializer
  %t36 = call <8 x float> @llvm.fma.v8f32(<8 x float> %t35, <8 x float> %t31, <8 x float> %t33)
  %t37 = getelementptr float, ptr %buf11, i64 8
  store <8 x float> %t36, ptr %t37, align 32
  %t38 = add nuw nsw i64 %i15, 1
  %t39 = icmp slt i64 %t38, 5
  br i1 %t39, label %loop13, label %done14
done14:
  %t40 = load <8 x float>, ptr %buf11, align 32
  %t41 = mul nsw i64 %i3, 40
  %t42 = mul nsw i64 %i6, 8
  %t43 = add nsw i64 %t41, %t42
  %t44 = getelementptr float, ptr %arg2, i64 %t43
  store <8 x float> %t40, ptr %t44, align 4
  %t45 = getelementptr float, ptr %buf11, i64 8
  %t46 = load <8 x float>, ptr %t45, align 32
  %t47 = getelementptr float, ptr %t44, i64 20
  store <8 x float> %t46, ptr %t47, align 4
  br label %join9
else10:
  store <8 x float> splat (float 0x0000000000000000), ptr %buf11, align 32
  %t48 = getelementptr float, ptr %buf11, i64 8
  store <8 x float> splat (float 0x0000000000000000), ptr %t48, align 32
  br label %loop49
loop49:
  %i51 = phi i64 [ 0, %else10 ], [ %t75, %loop49 ]
  %t52 = icmp slt <8 x i64> <i64 0, i64 1, i64 2, i64 3, i64 4, i64 5, i64 6, i64 7>, splat (i64 4)
  %t53 = mul nsw i64 %i3, 10
  %t54 = add nsw i64 %t53, %i51
  %t55 = getelementptr float, ptr %arg0, i64 %t54
  %t56 = load float, ptr %t55, align 4
  %t57 = mul nsw i64 %i6, 8
  %t58 = mul nsw i64 %i51, 20
  %t59 = add nsw i64 %t57, %t58
  %t60 = getelementptr float, ptr %arg1, i64 %t59
  %t61 = call <8 x float> @llvm.masked.load.v8f32.p0(ptr align 4 %t60, <8 x i1> %t52, <8 x float> zeroinitializer)
  %t62 = load <8 x float>, ptr %buf11, align 32
  %t63 = insertelement <8 x float> poison, float %t56, i64 0
  %t64 = shufflevector <8 x float> %t63, <8 x float> poison, <8 x i32> zeroinitializer
  %t65 = call <8 x float> @llvm.fma.v8f32(<8 x float> %t64, <8 x float> %t61, <8 x float> %t62)
  store <8 x float> %t65, ptr %buf11, align 32
  %t66 = getelementptr float, ptr %t55, i64 5
  %t67 = load float, ptr %t66, align 4
  %t68 = call <8 x float> @llvm.masked.load.v8f32.p0(ptr align 4 %t60, <8 x i1> %t52, <8 x float> zeroinitializer)
  %t69 = getelementptr float, ptr %buf11, i64 8
  %t70 = load <8 x float>, ptr %t69, align 32
  %t71 = insertelement <8 x float> poison, float %t67, i64 0
  %t72 = shufflevector <8 x float> %t71, <8 x float> poison, <8 x i32> zeroinitializer
  %t73 = call <8 x float> @llvm.fma.v8f32(<8 x float> %t72, <8 x float> %t68, <8 x float> %t70)
  %t74 = getelementptr float, ptr %buf11, i64 8
  store <8 x float> %t73, ptr %t74, align 32
  %t75 = add nuw nsw i64 %i51, 1
  %t76 = icmp slt i64 %t75, 5
  br i1 %t76, label %loop49, label %done50
done50:
  %t77 = icmp slt <8 x i64> <i64 0, i64 1, i64 2, i64 3, i64 4, i64 5, i64 6, i64 7>, splat (i64 4)
  %t78 = load <8 x float>, ptr %buf11, align 32
  %t79 = mul nsw i64 %i3, 40
  %t80 = mul nsw i64 %i6, 8
  %t81 = add nsw i64 %t79, %t80
  %t82 = getelementptr float, ptr %arg2, i64 %t81
  call void @llvm.masked.store.v8f32.p0(<8 x float> %t78, ptr align 4 %t82, <8 x i1> %t77)
  %t83 = getelementptr float, ptr %buf11, i64 8
  %t84 = load <8 x float>, ptr %t83, align 32
  %t85 = getelementptr float, ptr %t82, i64 20
  call void @llvm.masked.store.v8f32.p0(<8 x float> %t84, ptr align 4 %t85, <8 x i1> %t77)
  br label %join9
join9:
  %t86 = add nuw nsw i64 %i6, 1
  %t87 = icmp slt i64 %t86, 3
  br i1 %t87, label %loop4, label %done5
done5:
  %t88 = add nuw nsw i64 %i3, 1
  %t89 = icmp slt i64 %t88, 3
  br i1 %t89, label %loop1, label %done2
done2:
  ret i32 0
}

declare <8 x float> @llvm.fma.v8f32(<8 x float>, <8 x float>, <8 x float>)
declare <8 x float> @llvm.masked.load.v8f32.p0(ptr, <8 x i1>, <8 x float>)
declare void @llvm.masked.store.v8f32.p0(<8 x float>, ptr, <8 x i1>)

attributes #0 = { nounwind "no-builtins" "tune-cpu"="x86-64-v3" "prefer-vector-width"="256" "min-legal-vector-width"="256" }

!llvm.module.flags = !{!0, !1}
!0 = !{i32 8, !"PIC Level", i32 2}
!1 = !{i32 7, !"uwtable", i32 0}
!2 = distinct !{!2, !3}
!3 = !{!"llvm.loop.unroll.disable"}
